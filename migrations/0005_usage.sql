-- GPU time. A job's own is written with the end of each attempt; sums outlive their jobs.

-- What its attempts had of the devices so far, in ms: a worker's time is shared by the jobs that it runs at once.
ALTER TABLE job ADD COLUMN gpu_ms REAL NOT NULL DEFAULT 0;

-- Sums of attempts and of jobs that ended, by the hour of the end: hours since the epoch.
CREATE TABLE usage_job (
    hour   INTEGER NOT NULL,
    model  INTEGER NOT NULL,
    tenant INTEGER NOT NULL,
    gpu_ms REAL NOT NULL,
    jobs   INTEGER NOT NULL,
    PRIMARY KEY (hour, model, tenant)
) STRICT, WITHOUT ROWID;

-- Where the devices' time went, by the hour in which it passed. Model 0: no model held the device.
CREATE TABLE usage_device (
    hour           INTEGER NOT NULL,
    model          INTEGER NOT NULL,
    work_ms        REAL NOT NULL,
    swap_ms        REAL NOT NULL,
    idle_ms        REAL NOT NULL,
    -- Swaps to it that were made, and those that arrival order would have cost.
    swaps          INTEGER NOT NULL,
    swaps_in_order INTEGER NOT NULL,
    PRIMARY KEY (hour, model)
) STRICT, WITHOUT ROWID;
