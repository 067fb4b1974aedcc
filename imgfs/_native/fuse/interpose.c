/* The five functions of libfuse that pyfuse3 finds here first, since this object is loaded
 * RTLD_GLOBAL before it.  Until armed they pass everything on to libfuse. */
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

static void our_init(void *userdata, struct fuse_conn_info *conn)
{
	/* libfuse knows no larger value than the kernel's u16. */
	conn->max_background = max_background > 65535 ? 65535 : max_background;
	conn->congestion_threshold = conn->max_background / 4 * 3;
	/* The request threads had to have their buffers before this was known. */
	if (conn->max_write > MAX_PAYLOAD)
		conn->max_write = MAX_PAYLOAD;
	/* A file that changes otherwise than through the kernel is another inode here.  With this, each
	 * read after a write would first ask Python for the attributes. */
	conn->want &= ~(unsigned)FUSE_CAP_AUTO_INVAL_DATA;
	atomic_store(&max_write, conn->max_write);
	if (their_init)
		their_init(userdata, conn);
}

static struct fuse_session *remember(struct fuse_session *se)
{
	session = se;
	return se;
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

typedef struct fuse_session *new_fn(struct fuse_args *, const struct fuse_lowlevel_ops *, size_t,
				    void *);

EXPORT struct fuse_session *fuse_session_new(struct fuse_args *args,
					     const struct fuse_lowlevel_ops *op, size_t op_size,
					     void *userdata)
{
	new_fn *real = (new_fn *)next("fuse_session_new");
	struct fuse_lowlevel_ops ops;

	if (!atomic_load(&armed))
		return real(args, op, op_size, userdata);
	atomic_fetch_or(&hooks_called, HOOK_NEW);
	add_operations(&ops, op, op_size);
	return remember(real(args, &ops, sizeof(ops), userdata));
}

/* What a program built against libfuse 3.17 or later calls instead. */
struct fuse_session *fuse_session_new_versioned(struct fuse_args *,
						const struct fuse_lowlevel_ops *, size_t, void *,
						void *);
typedef struct fuse_session *new_versioned_fn(struct fuse_args *, const struct fuse_lowlevel_ops *,
					      size_t, void *, void *);

EXPORT struct fuse_session *fuse_session_new_versioned(struct fuse_args *args,
						       const struct fuse_lowlevel_ops *op,
						       size_t op_size, void *version,
						       void *userdata)
{
	new_versioned_fn *real = (new_versioned_fn *)next("fuse_session_new_versioned");
	struct fuse_lowlevel_ops ops;

	if (!real)
		return NULL;
	if (!atomic_load(&armed))
		return real(args, op, op_size, version, userdata);
	atomic_fetch_or(&hooks_called, HOOK_NEW);
	add_operations(&ops, op, op_size);
	return remember(real(args, &ops, sizeof(ops), version, userdata));
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
