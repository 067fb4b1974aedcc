/* The functions of libfuse that pyfuse3 finds here first, since this object is loaded RTLD_GLOBAL
 * before it.  Until armed they pass everything on to libfuse.
 *
 * A session is made by one of two.  libfuse 3.17 added fuse_session_new_versioned, and a macro in
 * its header that puts it in the place of fuse_session_new: so what was compiled with that header
 * binds to the one, and what was compiled with an older header, or calls it otherwise, to the other,
 * which all of libfuse 3 has.  Both are here whichever header this is compiled with. */
#define _GNU_SOURCE
#include "fast.h"

#include <dlfcn.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#define EXPORT __attribute__((visibility("default")))

atomic_bool armed;
atomic_uint hooks_called;
struct fuse_session *session;
unsigned max_background = 1024;
atomic_uint max_write;
uint64_t current_unique;
uint32_t current_pid;
bool current_dsync;

static void (*their_init)(void *userdata, struct fuse_conn_info *conn);

static void *next(const char *name)
{
	return dlsym(RTLD_NEXT, name);
}

#if FUSE_VERSION >= FUSE_MAKE_VERSION(3, 17)
#define WANT_EXT(conn) ((conn)->want_ext)
#else
static uint64_t no_want_ext;
#define WANT_EXT(conn) no_want_ext
#endif

/* What the filesystem wants of the kernel is in `want`, and since libfuse 3.17 in `want_ext`; one that
 * is changed in both, to something else, ends the session.  Whoever changes `want_ext` does so through
 * a function that keeps `want` in step. */
static void do_not_want(struct fuse_conn_info *conn, uint64_t want_ext_before, uint32_t flag)
{
	if (WANT_EXT(conn) != want_ext_before)
		WANT_EXT(conn) &= ~(uint64_t)flag;
	conn->want &= ~flag;
}

static void our_init(void *userdata, struct fuse_conn_info *conn)
{
	uint64_t want_ext = WANT_EXT(conn);

	/* libfuse knows no larger value than the kernel's u16. */
	conn->max_background = max_background > 65535 ? 65535 : max_background;
	conn->congestion_threshold = conn->max_background / 4 * 3;
	/* The request threads had to have their buffers before this was known. */
	if (conn->max_write > MAX_PAYLOAD)
		conn->max_write = MAX_PAYLOAD;
	atomic_store(&max_write, conn->max_write);
	if (their_init)
		their_init(userdata, conn);
	/* A file that changes otherwise than through the kernel is another inode here.  With this, each
	 * read after a write would first ask Python for the attributes. */
	do_not_want(conn, want_ext, FUSE_CAP_AUTO_INVAL_DATA);
}

static void add_operations(struct fuse_lowlevel_ops *ops, const struct fuse_lowlevel_ops *theirs,
			   size_t size)
{
	memset(ops, 0, sizeof(*ops));
	memcpy(ops, theirs, size < sizeof(*ops) ? size : sizeof(*ops));
	their_init = ops->init;
	ops->init = our_init;
	ops->lseek = extra_lseek;
	ops->fallocate = extra_fallocate;
	ops->copy_file_range = extra_copy_file_range;
}

/* Only its name is known to older headers, in which fuse_session_new is no macro either. */
struct libfuse_version;
#undef fuse_session_new
struct fuse_session *fuse_session_new(struct fuse_args *, const struct fuse_lowlevel_ops *, size_t,
				      void *);
struct fuse_session *fuse_session_new_versioned(struct fuse_args *,
						const struct fuse_lowlevel_ops *, size_t,
						struct libfuse_version *, void *);
typedef __typeof__(fuse_session_new) new_fn;
typedef __typeof__(fuse_session_new_versioned) new_versioned_fn;

/* `version` is NULL for what knows of none. */
static struct fuse_session *really_new(struct fuse_args *args, const struct fuse_lowlevel_ops *op,
				       size_t op_size, struct libfuse_version *version, void *userdata)
{
	new_versioned_fn *versioned = (new_versioned_fn *)next("fuse_session_new_versioned");
	new_fn *plain = (new_fn *)next("fuse_session_new");

	/* pyfuse3 may have been compiled with a newer libfuse than the one that is loaded. */
	if (version && versioned)
		return versioned(args, op, op_size, version, userdata);
	return plain ? plain(args, op, op_size, userdata) : NULL;
}

static struct fuse_session *new_session(struct fuse_args *args, const struct fuse_lowlevel_ops *op,
					size_t op_size, struct libfuse_version *version,
					void *userdata)
{
	struct fuse_lowlevel_ops ops;

	if (!atomic_load(&armed))
		return really_new(args, op, op_size, version, userdata);
	atomic_fetch_or(&hooks_called, HOOK_NEW);
	add_operations(&ops, op, op_size);
	session = really_new(args, &ops, sizeof(ops), version, userdata);
	return session;
}

EXPORT struct fuse_session *fuse_session_new(struct fuse_args *args,
					     const struct fuse_lowlevel_ops *op, size_t op_size,
					     void *userdata)
{
	return new_session(args, op, op_size, NULL, userdata);
}

EXPORT struct fuse_session *fuse_session_new_versioned(struct fuse_args *args,
						       const struct fuse_lowlevel_ops *op,
						       size_t op_size,
						       struct libfuse_version *version,
						       void *userdata)
{
	return new_session(args, op, op_size, version, userdata);
}

int real_session_fd(struct fuse_session *se)
{
	int (*real)(struct fuse_session *) = (int (*)(struct fuse_session *))next("fuse_session_fd");

	return real(se);
}

EXPORT int fuse_session_fd(struct fuse_session *se)
{
	if (!atomic_load(&armed))
		return real_session_fd(se);
	atomic_fetch_or(&hooks_called, HOOK_FD);
	return queue_event_fd();
}

static bool asks_for_dsync(const char *buf, size_t size)
{
	const struct fuse_in_header *in = (const struct fuse_in_header *)buf;
	const struct fuse_write_in *arg = (const void *)(in + 1);

	return in->opcode == FUSE_WRITE && size >= sizeof(*in) + sizeof(*arg) && is_dsync(arg);
}

EXPORT int fuse_session_receive_buf(struct fuse_session *se, struct fuse_buf *buf)
{
	struct request *rq;
	size_t size;

	if (!atomic_load(&armed)) {
		int (*real)(struct fuse_session *, struct fuse_buf *) =
			(int (*)(struct fuse_session *, struct fuse_buf *))
				next("fuse_session_receive_buf");

		return real(se, buf);
	}
	atomic_fetch_or(&hooks_called, HOOK_RECEIVE);
	rq = queue_pop();
	if (!rq) {
		if (!queue_ended())
			return -EINTR;   /* another task was faster */
		fuse_session_exit(se);
		return 0;
	}
	free(buf->mem);
	buf->mem = rq->mem;
	buf->size = size = rq->size;
	buf->flags = 0;
	current_unique = rq->unique;
	current_pid = ((const struct fuse_in_header *)buf->mem)->pid;
	current_dsync = asks_for_dsync(buf->mem, buf->size);
	free(rq);
	return (int)size;
}

/* An entry with nodeid 0 is a name and a d_ino; the kernel looks at its attributes no more,
 * and counts no look-up.  So readdir needs to open nothing. */
EXPORT size_t fuse_add_direntry_plus(fuse_req_t req, char *buf, size_t bufsize, const char *name,
				     const struct fuse_entry_param *e, off_t off)
{
	size_t (*real)(fuse_req_t, char *, size_t, const char *, const struct fuse_entry_param *,
		       off_t) =
		(size_t (*)(fuse_req_t, char *, size_t, const char *,
			    const struct fuse_entry_param *, off_t))next("fuse_add_direntry_plus");
	struct fuse_entry_param bare;

	if (!atomic_load(&armed))
		return real(req, buf, bufsize, name, e, off);
	atomic_fetch_or(&hooks_called, HOOK_DIRENT);
	memset(&bare, 0, sizeof(bare));
	bare.attr.st_ino = e->attr.st_ino;
	bare.attr.st_mode = e->attr.st_mode;
	return real(req, buf, bufsize, name, &bare, off);
}

/* Who opens with direct_io writes straight to the server, which needs no order of writes that overlap: the kernel
 * must not send one after the other.  libfuse 3.14 has no name for that. */
EXPORT int fuse_reply_open(fuse_req_t req, const struct fuse_file_info *fi)
{
	int (*real)(fuse_req_t, const struct fuse_file_info *) =
		(int (*)(fuse_req_t, const struct fuse_file_info *))next("fuse_reply_open");
	struct fuse_open_out out = { .fh = fi->fh, .open_flags = FOPEN_DIRECT_IO };

	if (!atomic_load(&armed) || !fi->direct_io)
		return real(req, fi);
	out.open_flags |= FOPEN_PARALLEL_DIRECT_WRITES;
	if (fi->keep_cache)
		out.open_flags |= FOPEN_KEEP_CACHE;
	if (fi->nonseekable)
		out.open_flags |= FOPEN_NONSEEKABLE;
	return fuse_reply_buf(req, (const char *)&out, sizeof(out));
}

bool is_interposed(void)
{
	static const char *const names[] = {
		"fuse_session_new", "fuse_session_new_versioned", "fuse_session_fd",
		"fuse_session_receive_buf", "fuse_add_direntry_plus", "fuse_reply_open",
	};
	Dl_info ours, found;
	size_t i;

	if (!dladdr((void *)next, &ours))
		return false;
	for (i = 0; i < sizeof(names) / sizeof(*names); i++) {
		void *first = dlsym(RTLD_DEFAULT, names[i]);

		if (!first || !dladdr(first, &found) || found.dli_fbase != ours.dli_fbase)
			return false;
	}
	return true;
}
