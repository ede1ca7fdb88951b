-- More of what was learned about a model; NULL: nothing yet. See store::Learned.
ALTER TABLE model ADD COLUMN wake_ms REAL;
ALTER TABLE model ADD COLUMN reload_ms REAL;
ALTER TABLE model ADD COLUMN gap_ms REAL;
ALTER TABLE model ADD COLUMN waiting_at_load REAL;

-- How much of the GPUs a tenant has had, in ms over its weight: the least served is next.
ALTER TABLE tenant ADD COLUMN served_ms REAL NOT NULL DEFAULT 0;
