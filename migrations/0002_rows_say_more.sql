-- What a job's row says is not stored a second time: `job.queued`, the start of the current attempt and the end are events
-- that readers derive from the row (docs/adr/0007). What only the submission carries stands in one row with the body;
-- large bodies and answers are files like artifacts are, all named in one table.

-- Chains of `=` instead of `IN (...)`: SQLite builds a temporary index for a list of more than two, each time a row is
-- written.
CREATE TABLE job_new (
    number         INTEGER PRIMARY KEY CHECK (number BETWEEN 0 AND 17179869183),
    tag            INTEGER NOT NULL,
    kind           TEXT NOT NULL CHECK
                       (kind = 'chat' OR kind = 'image' OR kind = 'audio' OR kind = 'completion' OR kind = 'custom'),
    face           TEXT NOT NULL CHECK (face IN ('sync', 'async')),
    model          INTEGER NOT NULL,
    tenant         INTEGER NOT NULL,
    batch          INTEGER,
    state          TEXT NOT NULL CHECK
                       (state = 'queued' OR state = 'running' OR state = 'succeeded' OR state = 'failed' OR
                        state = 'cancelling' OR state = 'cancelled' OR state = 'expired'),
    priority       INTEGER NOT NULL CHECK (priority BETWEEN 0 AND 9),
    attempt        INTEGER NOT NULL DEFAULT 0 CHECK (attempt >= 0),
    failures       INTEGER NOT NULL DEFAULT 0 CHECK (failures >= 0),
    crashes        INTEGER NOT NULL DEFAULT 0 CHECK (crashes >= 0),
    max_attempts   INTEGER NOT NULL CHECK (max_attempts >= 1),
    version        INTEGER NOT NULL DEFAULT 1,
    last_seq       INTEGER NOT NULL DEFAULT 1,
    batch_key      INTEGER NOT NULL,
    stream         INTEGER NOT NULL CHECK (stream IN (0, 1)),
    created_at     INTEGER NOT NULL,
    -- When it last came back to the queue; NULL: never, it has been there since it was accepted.
    requeued_at    INTEGER,
    started_at     INTEGER,
    -- The number of the event that is the start of the current attempt, and the run it was part of. NULL: that event, if
    -- there is one, is stored.
    started_seq    INTEGER,
    run            INTEGER,
    finished_at    INTEGER,
    not_before     INTEGER,
    start_deadline INTEGER,
    deadline       INTEGER,
    timeout_ms     INTEGER NOT NULL CHECK (timeout_ms > 0),
    -- The death of a worker that it was last part of: jobs that were lost together are tried again in halves.
    crash          INTEGER,
    -- Why it is to be cancelled, once somebody asked.
    cancel_code    TEXT CHECK (cancel_code IN ('cancelled_by_user', 'client_disconnected')),
    error          TEXT,
    -- The row of its answer.
    result         INTEGER,
    load_ms        INTEGER NOT NULL DEFAULT 0,
    -- When the next part of it is deleted: first what it holds (body, events, answer, files), then the row itself.
    -- 0: from before there was such a time; the next start sets it.
    expires_at     INTEGER,
    -- When its answer was first handed to a client.
    delivered_at   INTEGER,
    -- When what it held was deleted.
    emptied_at     INTEGER,
    -- A claimed job has an attempt and its time.
    CONSTRAINT claimed_has_attempt CHECK
        ((state <> 'running' AND state <> 'cancelling' AND state <> 'succeeded') OR (attempt > 0 AND started_at IS NOT NULL)),
    CONSTRAINT terminal_has_time CHECK
        ((state = 'queued' OR state = 'running' OR state = 'cancelling') = (finished_at IS NULL)),
    -- Nothing of a job that has not ended is ever deleted by age.
    CONSTRAINT only_ended_expires CHECK (finished_at IS NOT NULL OR (expires_at IS NULL AND emptied_at IS NULL))
) STRICT;

INSERT INTO job_new (number, tag, kind, face, model, tenant, batch, state, priority, attempt, failures, crashes, max_attempts,
                     version, last_seq, batch_key, stream, created_at, requeued_at, started_at, finished_at, not_before,
                     start_deadline, deadline, timeout_ms, cancel_code, error, result, load_ms, expires_at)
SELECT job.number, tag, kind, face, model, tenant, batch, state, priority, attempt, failures, crashes, max_attempts,
       version, last_seq, batch_key, stream, created_at, nullif(queued_at, created_at), started_at, finished_at, not_before,
       start_deadline, deadline, timeout_ms, cancel_code, job_detail.error, result.number, job_detail.load_ms, CASE WHEN finished_at IS NOT NULL THEN 0 END
FROM job JOIN job_detail USING (number) LEFT JOIN result USING (number);

-- What the submission carries. Without a body: it is the file of the role `request`.
CREATE TABLE request (
    number    INTEGER PRIMARY KEY,
    endpoint  TEXT NOT NULL,
    custom_id TEXT,
    metadata  TEXT,
    present   TEXT,
    retry_of  TEXT,
    body      BLOB
) STRICT;

INSERT INTO request (number, endpoint, custom_id, metadata, present, retry_of, body)
SELECT number, endpoint, custom_id, nullif(metadata, '{}'), nullif(present, '{}'), retry_of, body
FROM job_detail JOIN payload USING (number);

-- The answer of a succeeded job, named by its row in `job`. Its key is given in the order of the answers, so that they are
-- appended: jobs of one model, whose numbers lie far apart, would each be put onto a page of their own. Images stand in `body` as references to artifacts. Without a body: it is the file of the
-- role `response` if there is one, else the first artifact (audio).
CREATE TABLE result_new (
    id           INTEGER PRIMARY KEY,
    status       INTEGER NOT NULL,
    content_type TEXT NOT NULL,
    usage        TEXT,
    body         BLOB
) STRICT;

INSERT INTO result_new (id, status, content_type, usage, body)
SELECT number, status, content_type, usage, body FROM result;

-- Files of a job, under the data dir's `artifacts/`; `path` begins with the folder number / 1000.
CREATE TABLE file (
    number   INTEGER NOT NULL,
    role     TEXT NOT NULL CHECK (role = 'request' OR role = 'response' OR role = 'artifact'),
    position INTEGER NOT NULL,
    name     TEXT NOT NULL,
    mime     TEXT NOT NULL,
    bytes    INTEGER NOT NULL,
    sha256   TEXT NOT NULL,
    path     TEXT NOT NULL,
    PRIMARY KEY (number, role, position)
) STRICT, WITHOUT ROWID;

INSERT INTO file (number, role, position, name, mime, bytes, sha256, path)
SELECT number, 'artifact', position, name, mime, bytes, sha256, path FROM artifact;

-- Idempotency keys of the last day; looked up in memory, so no index on random values.
CREATE TABLE idempotency (
    id           INTEGER PRIMARY KEY,
    -- 16 bytes of SHA-256 over tenant, route and key; the same over the body.
    key_hash     BLOB NOT NULL,
    request_hash BLOB NOT NULL,
    number       INTEGER NOT NULL,
    at           INTEGER NOT NULL
) STRICT;

DROP VIEW job_full;
DROP TABLE job;
DROP TABLE job_detail;
DROP TABLE payload;
DROP TABLE result;
DROP TABLE artifact;
ALTER TABLE job_new RENAME TO job;
ALTER TABLE result_new RENAME TO result;

-- All partial: small, and written at their right edge.
-- Written at the submission and the end only: a claim touches no index.
CREATE INDEX job_live ON job (number) WHERE finished_at IS NULL;
CREATE INDEX job_batch ON job (batch, number) WHERE batch IS NOT NULL;
CREATE INDEX job_expiry ON job (expires_at) WHERE expires_at IS NOT NULL;

-- What has not ended is never deleted, whoever asks: the last line of defence behind the guarded deletes. (That a terminal
-- job never changes is held by the guards of the updates alone: with a trigger, SQLite writes each update in two passes
-- through a temporary table.)
CREATE TRIGGER job_live_is_kept BEFORE DELETE ON job
WHEN OLD.finished_at IS NULL
BEGIN
    SELECT RAISE(ABORT, 'a job that has not ended is never deleted');
END;
