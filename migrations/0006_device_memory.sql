-- Memory that a worker of a model took on each of its devices, as it told last, bytes; NULL: it never told.
ALTER TABLE model ADD COLUMN device_bytes INTEGER;
