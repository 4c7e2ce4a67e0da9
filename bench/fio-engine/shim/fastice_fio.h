/*
 * What the shim (engine.c) calls of the engine (src/ffi.rs, which declares the same: keep both equal).
 *
 * Functions give 0 or an errno, and a message for people with it. A session belongs to one job, and one thread uses it at a
 * time. Nothing here depends on fio.
 */
#ifndef FASTICE_FIO_H
#define FASTICE_FIO_H

#include <stdint.h>

/* The options of a job; strings may be NULL. */
struct fi_job {
	const char *traddr;
	const char *subnqn;
	const char *hostnqn;
	const char *hostid;
	uint32_t trsvcid;
	uint32_t nsid;
	uint32_t queue_size;
	uint32_t iodepth;
	uint32_t keep_alive_tmo_s;
	uint32_t hdr_digest;
	uint32_t data_digest;
	uint32_t hipri;
};

/* A namespace. */
struct fi_geometry {
	uint64_t size;             /* bytes */
	uint32_t block_size;       /* bytes */
	uint32_t transfer_len_max; /* bytes that one command may carry */
	uint32_t read_only;
	uint32_t deallocates;      /* there is Dataset Management */
};

struct fi_message {
	char text[512];
};

enum fi_kind {
	FI_READ = 0,
	FI_WRITE = 1,
	FI_FLUSH = 2,
	FI_TRIM = 3,
};

/* data: of a write until fastice_fio_queue returns, of a read until the event of its tag is given. */
struct fi_command {
	void *tag;
	uint8_t *data;
	uint64_t offset;
	uint64_t len;
	uint32_t kind;
	uint32_t fua;
};

/* How a command ended. */
struct fi_event {
	void *tag;
	int error;       /* 0, or an errno */
	uint32_t status; /* of NVMe; 0 when there was none */
};

/* As in src/ffi.rs. */
_Static_assert(sizeof(struct fi_job) == 64, "fi_job");
_Static_assert(sizeof(struct fi_geometry) == 24, "fi_geometry");
_Static_assert(sizeof(struct fi_message) == 512, "fi_message");
_Static_assert(sizeof(struct fi_command) == 40, "fi_command");
_Static_assert(sizeof(struct fi_event) == 16, "fi_event");

struct fi_session;

/* Connects, looks, and closes; what was seen once is remembered for the other jobs of a process. */
int fastice_fio_geometry(const struct fi_job *job, struct fi_geometry *geometry, struct fi_message *message);

/* Connects: an admin queue, which is kept alive, and one I/O queue of iodepth commands. */
int fastice_fio_open(const struct fi_job *job, struct fi_session **session, struct fi_message *message);

/* Takes a command, which fastice_fio_send sends. EBUSY: not now. */
int fastice_fio_queue(struct fi_session *session, const struct fi_command *command, struct fi_message *message);

void fastice_fio_send(struct fi_session *session);

/*
 * Waits for at least min ends, takes at most max, and gives their number, or an errno below zero. When the connection broke,
 * every command in flight ends with an error, and the message says once why; else it is empty.
 */
int fastice_fio_reap(struct fi_session *session, uint32_t min, uint32_t max, struct fi_message *message);

/* One of those of the last fastice_fio_reap. */
struct fi_event fastice_fio_event(const struct fi_session *session, uint32_t index);

/* The name of an NVMe status. */
void fastice_fio_status_text(uint32_t status, struct fi_message *message);

/* Shuts the controller down; NULL is left alone. */
int fastice_fio_close(struct fi_session *session, struct fi_message *message);

#endif
