//! The loop's side of new jobs: whether they may come in, their numbers, and their way into the store.

use super::*;

impl Scheduler {
    /// Assigns numbers and hands the jobs to the store in one go, so that the order of acceptance, of numbers and of
    /// commits is one. A single job takes the fast path if its model's worker is free for it.
    pub(super) fn submit(&mut self, jobs: Vec<NewJob>, key: Option<IdempotencyKey>, reply: Reply) {
        if let Err(refusal) = self.refuse(&jobs) {
            let _ = reply.send(Err(refusal));
            return;
        }
        let now = self.context.clock.now();
        let mut numbered = Vec::with_capacity(jobs.len());
        for job in jobs {
            let Ok(tag) = getrandom::u64() else {
                let error = StoreError::Unusable("the system gives no random numbers".to_owned());
                let _ = reply.send(Err(SubmitError::Store(error)));
                return;
            };
            self.state.count_arrival(&job.model, now);
            numbered.push((JobId::new(now, self.next_number, tag), job));
            self.next_number += 1;
        }
        let fast = match &numbered[..] {
            // Whether a submission with a key is new is known when it is committed.
            [(id, job)] if key.is_none() => self.reserve(*id, job, now),
            _ => None,
        };
        // Only whoever submits one job may wait for it; members of a batch are looked up.
        let watch = match &numbered[..] {
            [(id, _)] => Some(self.context.hub.watch(id.number)),
            _ => None,
        };
        match fast {
            Some(dispatch) => self.insert_claimed(numbered, watch, dispatch, reply),
            None => self.insert_queued(numbered, key, watch, reply),
        }
    }

    fn refuse(&mut self, jobs: &[NewJob]) -> Result<(), SubmitError> {
        if self.context.tasks.soft().is_cancelled() {
            return Err(SubmitError::Draining);
        }
        if let Some(job) = jobs.iter().find(|job| self.state.is_draining(&job.model)) {
            let resume = resume_command(&job.model, self.state.controls().all.draining);
            return Err(SubmitError::Drained { model: job.model.clone(), resume });
        }
        if self.context.store.is_full() {
            return Err(SubmitError::Store(StoreError::Full));
        }
        let Some(first) = jobs.first() else {
            return Ok(());
        };
        self.state.admit(&first.tenant, jobs.len()).map_err(|full| match full.is_for_ever() {
            true => SubmitError::TooMany(full),
            false => SubmitError::QueueFull { full, retry_after_s: self.state.room_in_s() },
        })?;
        let now = self.context.clock.now();
        if let Some(error) = jobs.iter().find_map(|job| self.state.refuse_too_big(&job.model, now)) {
            return Err(SubmitError::TooBig(Box::new(error)));
        }
        let sync = jobs.iter().find(|job| job.face == Face::Sync);
        match sync.and_then(|job| self.state.refusal(&job.model)) {
            Some(error) => Err(SubmitError::ModelLoadFailed(Box::new(error.clone()))),
            None => Ok(()),
        }
    }

    fn reserve(&mut self, id: JobId, new: &NewJob, now: Millis) -> Option<Dispatch> {
        let (model, tenant) = (shared(&mut self.names, &new.model), shared(&mut self.names, &new.tenant));
        let job = QueuedJob::of(id.number, id.created_ms, new, model.clone(), tenant);
        let place = self.state.reserve(&job, now)?;
        self.changed = true;
        let stop = Stop::default();
        self.stops.insert(id.number, stop.clone());
        self.handle.observe_wait(0.0);
        let job = ClaimedJob {
            change: Change { number: id.number, state: JobState::Running, version: 2, seq: 2 },
            token: Token { id, attempt: 1 },
            kind: JobKind::of_endpoint(&new.endpoint),
            face: new.face,
            failures: 0,
            crashes: 0,
            crash: None,
            max_attempts: new.max_attempts,
            stream: new.stream,
            deadline: new.deadline,
            timeout_ms: new.timeout_ms,
            endpoint: new.endpoint.clone(),
            body: Body::Inline(new.body.clone()),
        };
        let names_shape = place.max_batch > 1;
        Some(Dispatch { job, model, place, run: None, alone: false, run_jobs: 1, names_shape, stop })
    }

    fn insert_claimed(&self, jobs: Vec<(JobId, NewJob)>, watch: Option<JobWatch>, dispatch: Dispatch, reply: Reply) {
        let context = self.context.clone();
        let inserted = context.store.insert(jobs, true, None);
        self.context.tasks.spawn("dispatch", async move {
            match inserted.await {
                Ok(Inserted { jobs, replayed }) => {
                    let _ = reply.send(Ok(Accepted { jobs, watch, position: None, replayed }));
                    dispatch::run(context, dispatch).await;
                }
                Err(error) => {
                    let (model, number) = (dispatch.model.clone(), dispatch.job.token.id.number);
                    let event = Event::Ended { model, number, answered: false, suspect: false, back: None };
                    context.tell(Message::Event(event));
                    let _ = reply.send(Err(SubmitError::Store(error)));
                }
            }
        });
    }

    fn insert_queued(
        &mut self,
        jobs: Vec<(JobId, NewJob)>,
        key: Option<IdempotencyKey>,
        watch: Option<JobWatch>,
        reply: Reply,
    ) {
        let queued: Vec<QueuedJob> = jobs
            .iter()
            .map(|(id, job)| {
                let (model, tenant) = (shared(&mut self.names, &job.model), shared(&mut self.names, &job.tenant));
                QueuedJob::of(id.number, id.created_ms, job, model, tenant)
            })
            .collect();
        let context = self.context.clone();
        let inserted = context.store.insert(jobs, false, key);
        self.context.tasks.spawn("insert", async move {
            let accepted = match inserted.await {
                Ok(Inserted { jobs, replayed: false }) => {
                    // The loop replies: whoever knows the id can only ask about a job that the loop knows, too.
                    let accepted = Accepted { jobs, watch, position: None, replayed: false };
                    if let Err(unsent) = context.messages.send(Message::Accepted { queued, accepted, reply }) {
                        confirm(unsent.0);
                    }
                    return;
                }
                Ok(Inserted { jobs, replayed: true }) => {
                    let watch = watch.and_then(|_| jobs.first()).map(|job| context.hub.watch(job.id.number));
                    Ok(Accepted { jobs, watch, position: None, replayed: true })
                }
                Err(error) => Err(SubmitError::Store(error)),
            };
            let _ = reply.send(accepted);
        });
    }
}
