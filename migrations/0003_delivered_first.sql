-- Answers that were handed out and are still kept, by the end of their jobs: what goes first when the quota is used up.
CREATE INDEX job_delivered ON job (finished_at) WHERE delivered_at IS NOT NULL AND emptied_at IS NULL;
