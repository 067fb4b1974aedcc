/* What pyfuse3 is to libfuse, made with an old header or with a new one: it binds to
 * fuse_session_new, or to fuse_session_new_versioned. */
#include <stddef.h>
#include <stdint.h>

struct args {
	int argc;
	char **argv;
	int allocated;
};

struct version {
	uint32_t major, minor, hotfix, padding;
};

void *fuse_session_new(struct args *, const void *op, size_t op_size, void *userdata);
void *fuse_session_new_versioned(struct args *, const void *op, size_t op_size, struct version *,
				 void *userdata) __attribute__((weak));
void fuse_session_destroy(void *session);
int fuse_session_fd(void *session);

/* 0: a session was made, and is gone again. */
int make_session(int versioned)
{
	static void *ops[64];
	char name[] = "client", *argv[] = { name, NULL };
	struct args args = { 1, argv, 0 };
	struct version version = { 3, 17, 0, 0 };
	void *session;

	if (versioned)
		session = fuse_session_new_versioned(&args, ops, sizeof(ops[0]) * 40, &version,
						     NULL);
	else
		session = fuse_session_new(&args, ops, sizeof(ops[0]) * 40, NULL);
	if (!session)
		return -1;
	fuse_session_fd(session);
	fuse_session_destroy(session);
	return 0;
}
