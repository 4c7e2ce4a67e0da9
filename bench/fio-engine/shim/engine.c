/*
 * fio's side of the engine: the table of functions that fio looks for, its options, and the way from an io_u to a command.
 *
 * It is compiled against the headers of the fio that will load it, for fio's structures differ from release to release:
 * build.sh finds them. What is behind fastice_fio.h knows nothing of fio.
 */
#include <errno.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#include <fio.h>
#include <optgroup.h>

#include "fastice_fio.h"

#ifndef FASTICE_FIO_BUILT_FOR
#error "FASTICE_FIO_BUILT_FOR names the version of fio whose headers these are; see build.sh"
#endif

/* The first member is fio's own. */
struct options {
	void *pad;
	char *traddr;
	char *subnqn;
	char *hostnqn;
	char *hostid;
	unsigned int trsvcid;
	unsigned int nsid;
	unsigned int queue_size;
	unsigned int keep_alive_tmo;
	unsigned int hdr_digest;
	unsigned int data_digest;
	unsigned int hipri;
};

#define TEXT(option, what)                                                                                          \
	{                                                                                                           \
		.name = #option, .lname = #option, .type = FIO_OPT_STR_STORE, .off1 = offsetof(struct options, option), \
		.help = what, .category = FIO_OPT_C_ENGINE, .group = FIO_OPT_G_INVALID,                             \
	}
#define NUMBER(option, default, what)                                                                               \
	{                                                                                                           \
		.name = #option, .lname = #option, .type = FIO_OPT_INT, .off1 = offsetof(struct options, option),   \
		.def = default, .help = what, .category = FIO_OPT_C_ENGINE, .group = FIO_OPT_G_INVALID,             \
	}
#define FLAG(option, what)                                                                                          \
	{                                                                                                           \
		.name = #option, .lname = #option, .type = FIO_OPT_BOOL, .off1 = offsetof(struct options, option),  \
		.def = "0", .help = what, .category = FIO_OPT_C_ENGINE, .group = FIO_OPT_G_INVALID,                 \
	}

/* Named as the arguments of `nvme connect` are. */
static struct fio_option options[] = {
	TEXT(traddr, "Address or name of the target"),
	NUMBER(trsvcid, "4420", "TCP port of the target"),
	TEXT(subnqn, "NQN of the subsystem"),
	NUMBER(nsid, "1", "Namespace"),
	TEXT(hostnqn, "Our NQN [/etc/nvme/hostnqn, else one made up]"),
	TEXT(hostid, "Our host identifier, a UUID [/etc/nvme/hostid, else the one in hostnqn]"),
	NUMBER(queue_size, "0", "Entries of the I/O queue, where that is more than iodepth needs"),
	NUMBER(keep_alive_tmo, "5", "Keep Alive Timeout in seconds, 0 for none"),
	FLAG(hdr_digest, "Use header digests"),
	FLAG(data_digest, "Use data digests"),
	FLAG(hipri, "Ask the socket again and again instead of sleeping until something comes"),
	{ .name = NULL },
};

/* What a job has. */
struct job {
	struct fi_session *session;
	/* What was taken and not yet sent. */
	struct io_u **unsent;
	unsigned int unsent_count;
	/* Why a command could not be taken was printed: with continue_on_error there may be millions. */
	bool told;
};

static struct ioengine_ops engine;

static void tell(struct thread_data *td, const char *text)
{
	log_err("fio: %s: fastice: %s\n", td->o.name, text);
}

static int fail(struct thread_data *td, int error, const char *text)
{
	tell(td, text);
	td_verror(td, error, "fastice");
	return error;
}

static struct fi_job job_of(struct thread_data *td)
{
	const struct options *o = td->eo;

	return (struct fi_job){
		.traddr = o->traddr,
		.subnqn = o->subnqn,
		.hostnqn = o->hostnqn,
		.hostid = o->hostid,
		.trsvcid = o->trsvcid,
		.nsid = o->nsid,
		.queue_size = o->queue_size,
		.iodepth = td->o.iodepth,
		.keep_alive_tmo_s = o->keep_alive_tmo,
		.hdr_digest = o->hdr_digest,
		.data_digest = o->data_digest,
		.hipri = o->hipri,
	};
}

/* What no command could do is refused before the job begins. */
static int check(struct thread_data *td, const struct fi_geometry *g)
{
	const unsigned int asked[] = { TD_DDIR_READ, TD_DDIR_WRITE, TD_DDIR_TRIM };
	char text[256];

	for (int ddir = DDIR_READ; ddir <= DDIR_TRIM; ddir++) {
		if (!(td->o.td_ddir & asked[ddir]))
			continue;
		if (td->o.min_bs[ddir] % g->block_size || td->o.max_bs[ddir] % g->block_size) {
			snprintf(text, sizeof(text), "bs: the namespace has blocks of %u bytes", g->block_size);
			return fail(td, EINVAL, text);
		}
		if (ddir != DDIR_TRIM && td->o.max_bs[ddir] > g->transfer_len_max) {
			snprintf(text, sizeof(text), "bs: a command to this target carries at most %u bytes",
				 g->transfer_len_max);
			return fail(td, EINVAL, text);
		}
	}
	if ((td_write(td) || td_trim(td)) && g->read_only)
		return fail(td, EROFS, "the namespace is write protected");
	if (td_trim(td) && !g->deallocates)
		return fail(td, EOPNOTSUPP, "this target has no Dataset Management, which a trim needs");
	return 0;
}

/* Called for each job before it has a thread or process of its own: so nothing stays connected. */
static int setup(struct thread_data *td)
{
	struct fi_job job = job_of(td);
	struct fi_geometry geometry;
	struct fi_message message;
	struct fio_file *f;
	unsigned int i;
	int error;

	if (td->o.nr_files != 1)
		return fail(td, EINVAL, "a job has one namespace: leave filename and nr_files out, and set nsid");
	error = fastice_fio_geometry(&job, &geometry, &message);
	if (error)
		return fail(td, error, message.text);
	error = check(td, &geometry);
	if (error)
		return error;
	for_each_file (td, f, i) {
		f->filetype = FIO_TYPE_BLOCK;
		f->real_file_size = geometry.size;
		fio_file_set_size_known(f);
	}
	return 0;
}

static void cleanup(struct thread_data *td)
{
	struct job *job = td->io_ops_data;
	struct fi_message message;

	if (!job)
		return;
	if (fastice_fio_close(job->session, &message))
		tell(td, message.text);
	free(job->unsent);
	free(job);
	td->io_ops_data = NULL;
}

static int init(struct thread_data *td)
{
	struct fi_job options = job_of(td);
	struct fi_message message;
	struct job *job;
	int error;

	/* What lies before this in fio's structures lies where the headers say. */
	if (td->io_ops != &engine) {
		log_err("fio: fastice: this fio has other structures than the headers that the engine was built with\n");
		return ENOEXEC;
	}
	job = calloc(1, sizeof(*job));
	if (job)
		job->unsent = calloc(td->o.iodepth, sizeof(*job->unsent));
	if (!job || !job->unsent) {
		free(job);
		return fail(td, ENOMEM, "no memory");
	}
	error = fastice_fio_open(&options, &job->session, &message);
	if (error) {
		free(job->unsent);
		free(job);
		return fail(td, error, message.text);
	}
	td->io_ops_data = job;
	return 0;
}

static int command_of(struct thread_data *td, struct io_u *io_u, struct fi_command *command)
{
	*command = (struct fi_command){
		.tag = io_u,
		.data = io_u->xfer_buf,
		.offset = io_u->offset,
		.len = io_u->xfer_buflen,
	};
	switch (io_u->ddir) {
	case DDIR_READ:
		command->kind = FI_READ;
		return 0;
	case DDIR_WRITE:
		command->kind = FI_WRITE;
		command->fua = td->o.sync_io != 0;
		return 0;
	case DDIR_TRIM:
		command->kind = FI_TRIM;
		return 0;
	case DDIR_SYNC:
	case DDIR_DATASYNC:
	case DDIR_SYNC_FILE_RANGE:
		command->kind = FI_FLUSH;
		return 0;
	default:
		return EINVAL;
	}
}

static enum fio_q_status queue(struct thread_data *td, struct io_u *io_u)
{
	struct job *job = td->io_ops_data;
	struct fi_command command;
	struct fi_message message;
	int error;

	fio_ro_check(td, io_u);
	if (job->unsent_count == td->o.iodepth)
		return FIO_Q_BUSY;
	io_u->engine_data = NULL;
	error = command_of(td, io_u, &command);
	if (error)
		strcpy(message.text, "not something that NVMe does");
	else
		error = fastice_fio_queue(job->session, &command, &message);
	if (error == EBUSY)
		return FIO_Q_BUSY;
	if (error) {
		if (!job->told)
			tell(td, message.text);
		job->told = true;
		io_u->error = error;
		return FIO_Q_COMPLETED;
	}
	job->unsent[job->unsent_count++] = io_u;
	return FIO_Q_QUEUED;
}

/* One system call for all that was taken since the last one. */
static int commit(struct thread_data *td)
{
	struct job *job = td->io_ops_data;
	struct timespec now;

	if (!job->unsent_count)
		return 0;
	fastice_fio_send(job->session);
	if (fio_fill_issue_time(td)) {
		fio_gettime(&now, NULL);
		for (unsigned int i = 0; i < job->unsent_count; i++) {
			job->unsent[i]->issue_time = now;
			io_u_queued(td, job->unsent[i]);
		}
		/* Only for an I/O log. */
		if (td->o.read_iolog_file)
			td->last_issue = now;
	}
	job->unsent_count = 0;
	return 0;
}

/* fio gives no time, or none at all to wait, and then min is 0. */
static int getevents(struct thread_data *td, unsigned int min, unsigned int max, const struct timespec *t)
{
	struct job *job = td->io_ops_data;
	struct fi_message message;
	int count;

	(void)t;
	count = fastice_fio_reap(job->session, min, max, &message);
	if (message.text[0])
		tell(td, message.text);
	return count;
}

static struct io_u *event(struct thread_data *td, int index)
{
	struct job *job = td->io_ops_data;
	struct fi_event ended = fastice_fio_event(job->session, index);
	struct io_u *io_u = ended.tag;

	if (io_u) {
		io_u->error = ended.error;
		io_u->engine_data = (void *)(uintptr_t)ended.status;
	}
	return io_u;
}

/* fio prints and frees it. */
static char *errdetails(struct io_u *io_u)
{
	uint32_t status = (uintptr_t)io_u->engine_data;
	struct fi_message message;

	if (!status)
		return strdup("fastice: the target gave no NVMe status for it");
	fastice_fio_status_text(status, &message);
	return strdup(message.text);
}

static int open_file(struct thread_data *td, struct fio_file *f)
{
	(void)td;
	(void)f;
	return 0;
}

static int close_file(struct thread_data *td, struct fio_file *f)
{
	(void)td;
	(void)f;
	return 0;
}

static struct ioengine_ops engine = {
	.name = "fastice",
	.version = FIO_IOOPS_VERSION,
	.flags = FIO_DISKLESSIO | FIO_NOEXTEND | FIO_NODISKUTIL | FIO_MEMALIGN | FIO_ASYNCIO_SETS_ISSUE_TIME,
	.setup = setup,
	.init = init,
	.queue = queue,
	.commit = commit,
	.getevents = getevents,
	.event = event,
	.errdetails = errdetails,
	.cleanup = cleanup,
	.open_file = open_file,
	.close_file = close_file,
	.option_struct_size = sizeof(struct options),
	.options = options,
};

/*
 * The one symbol that fio finds. It checks FIO_IOOPS_VERSION itself, but that stays the same over releases whose structures
 * differ; so the release has to be the very one.
 */
void get_ioengine(struct ioengine_ops **ops)
{
	if (strcmp(fio_version_string, FASTICE_FIO_BUILT_FOR)) {
		log_err("fio: fastice: the engine was built for %s, and this is %s: run `make fio-engine` where this fio is\n",
			FASTICE_FIO_BUILT_FOR, fio_version_string);
		*ops = NULL;
		return;
	}
	*ops = &engine;
}
