-- The durable queue. Times are ms since the epoch. The states and their words are those of src/domain/job.rs.

-- Dictionaries: names as small integers.
CREATE TABLE model (
    id         INTEGER PRIMARY KEY,
    name       TEXT NOT NULL UNIQUE,
    -- What was learned about it; NULL: nothing yet.
    load_ms    REAL,
    stop_ms    REAL,
    service_ms REAL,
    each_ms    REAL,
    left_at    INTEGER
) STRICT;

CREATE TABLE tenant (
    id   INTEGER PRIMARY KEY,
    name TEXT NOT NULL UNIQUE
) STRICT;

CREATE TABLE batch (
    id         INTEGER PRIMARY KEY,
    tenant     INTEGER NOT NULL,
    created_at INTEGER NOT NULL,
    total      INTEGER NOT NULL CHECK (total > 0)
) STRICT;

CREATE TABLE meta (
    key   TEXT PRIMARY KEY,
    value TEXT NOT NULL
) STRICT, WITHOUT ROWID;

-- One row per job, small: what claiming, listing and guarding need.
CREATE TABLE job (
    number         INTEGER PRIMARY KEY CHECK (number BETWEEN 0 AND 17179869183),
    tag            INTEGER NOT NULL,
    kind           TEXT NOT NULL CHECK (kind IN ('chat', 'completion', 'image', 'audio', 'custom')),
    face           TEXT NOT NULL CHECK (face IN ('sync', 'async')),
    model          INTEGER NOT NULL,
    tenant         INTEGER NOT NULL,
    batch          INTEGER,
    state          TEXT NOT NULL CHECK (state IN
                       ('queued', 'running', 'cancelling', 'succeeded', 'failed', 'cancelled', 'expired')),
    state_reason   TEXT CHECK (state_reason IN
                       ('waiting_for_model', 'model_fetching', 'model_loading', 'model_blocked', 'no_gpu',
                        'retry_backoff', 'scheduled', 'dependency', 'paused')),
    priority       INTEGER NOT NULL CHECK (priority BETWEEN 0 AND 9),
    attempt        INTEGER NOT NULL DEFAULT 0 CHECK (attempt >= 0),
    failures       INTEGER NOT NULL DEFAULT 0 CHECK (failures >= 0),
    crashes        INTEGER NOT NULL DEFAULT 0 CHECK (crashes >= 0),
    max_attempts   INTEGER NOT NULL CHECK (max_attempts >= 1),
    version        INTEGER NOT NULL DEFAULT 1,
    last_seq       INTEGER NOT NULL DEFAULT 0,
    batch_key      INTEGER NOT NULL,
    stream         INTEGER NOT NULL CHECK (stream IN (0, 1)),
    created_at     INTEGER NOT NULL,
    queued_at      INTEGER NOT NULL,
    started_at     INTEGER,
    finished_at    INTEGER,
    not_before     INTEGER,
    start_deadline INTEGER,
    deadline       INTEGER,
    timeout_ms     INTEGER NOT NULL CHECK (timeout_ms > 0),
    -- Why it is to be cancelled, once somebody asked.
    cancel_code    TEXT CHECK (cancel_code IN ('cancelled_by_user', 'client_disconnected')),
    -- A queued job says why; no other does.
    CONSTRAINT reason_while_queued CHECK ((state = 'queued') = (state_reason IS NOT NULL)),
    -- A claimed job has an attempt and its time.
    CONSTRAINT claimed_has_attempt CHECK (state NOT IN ('running', 'cancelling', 'succeeded') OR (attempt > 0 AND started_at IS NOT NULL)),
    CONSTRAINT terminal_has_time CHECK
        ((state IN ('succeeded', 'failed', 'cancelled', 'expired')) = (finished_at IS NOT NULL))
) STRICT;

CREATE INDEX job_queued ON job (number, model, priority) WHERE state = 'queued';
CREATE INDEX job_running ON job (number) WHERE state IN ('running', 'cancelling');
CREATE INDEX job_batch ON job (batch, number) WHERE batch IS NOT NULL;

-- A terminal job never changes: the last line of defence behind the guarded updates.
CREATE TRIGGER job_terminal_is_final BEFORE UPDATE OF state, attempt ON job
WHEN OLD.state IN ('succeeded', 'failed', 'cancelled', 'expired')
BEGIN
    SELECT RAISE(ABORT, 'a terminal job never changes');
END;

-- The forwarded body, as sent to workers.
CREATE TABLE payload (
    number INTEGER PRIMARY KEY,
    body   BLOB NOT NULL
) STRICT;

-- What only a look at the job needs.
CREATE TABLE job_detail (
    number    INTEGER PRIMARY KEY,
    endpoint  TEXT NOT NULL,
    custom_id TEXT,
    metadata  TEXT NOT NULL DEFAULT '{}',
    present   TEXT NOT NULL DEFAULT '{}',
    retry_of  TEXT,
    error     TEXT,
    load_ms   INTEGER NOT NULL DEFAULT 0
) STRICT;

-- The answer of a succeeded job. Images stand in `body` as references to artifacts; an answer that is one file (audio)
-- has no body but the artifact's position.
CREATE TABLE result (
    number       INTEGER PRIMARY KEY,
    status       INTEGER NOT NULL,
    content_type TEXT NOT NULL,
    body         BLOB,
    artifact     INTEGER,
    usage        TEXT,
    CONSTRAINT one_source CHECK ((body IS NULL) <> (artifact IS NULL))
) STRICT;

-- Files of a job, under the data dir's `artifacts/`.
CREATE TABLE artifact (
    number   INTEGER NOT NULL,
    position INTEGER NOT NULL,
    name     TEXT NOT NULL,
    mime     TEXT NOT NULL,
    bytes    INTEGER NOT NULL,
    sha256   TEXT NOT NULL,
    path     TEXT NOT NULL,
    PRIMARY KEY (number, position)
) STRICT, WITHOUT ROWID;

-- What happened to a job; `seq` is gapless from 1.
CREATE TABLE event (
    number  INTEGER NOT NULL,
    seq     INTEGER NOT NULL CHECK (seq > 0),
    attempt INTEGER NOT NULL,
    kind    TEXT NOT NULL,
    at      INTEGER NOT NULL,
    body    TEXT NOT NULL,
    PRIMARY KEY (number, seq)
) STRICT, WITHOUT ROWID;

-- A job with everything a screen shows.
CREATE VIEW job_full AS
SELECT job.*, model.name AS model_name, tenant.name AS tenant_name,
       job_detail.endpoint, job_detail.custom_id, job_detail.metadata, job_detail.present, job_detail.retry_of,
       job_detail.error, job_detail.load_ms, result.usage
FROM job
JOIN model ON model.id = job.model
JOIN tenant ON tenant.id = job.tenant
JOIN job_detail ON job_detail.number = job.number
LEFT JOIN result ON result.number = job.number;
