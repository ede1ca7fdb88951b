-- More of what was learned about a model; NULL: it never told. See store::Learned.
-- Which entry of models.yaml all that is said here of memory was learned of: a hash of what its workers see of it.
ALTER TABLE model ADD COLUMN entry INTEGER;
-- Its copy in host memory, bytes; whether it can be parked, and what it says about that; whether the copy is made at a load.
ALTER TABLE model ADD COLUMN host_bytes INTEGER;
ALTER TABLE model ADD COLUMN can_park INTEGER CHECK (can_park IN (0, 1));
ALTER TABLE model ADD COLUMN park_note TEXT;
ALTER TABLE model ADD COLUMN copies_at_load INTEGER CHECK (copies_at_load IN (0, 1));
-- What its parked process keeps of each of its GPUs, bytes.
ALTER TABLE model ADD COLUMN keeps_bytes INTEGER;

-- How many jobs of each shape its passes take, as JSON: domain::shape::KeptBatches.
ALTER TABLE model ADD COLUMN batches TEXT;
