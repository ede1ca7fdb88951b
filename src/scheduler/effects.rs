//! Carries out the effects of the state machine beside the loop: claims, orders, ends of waiting jobs, what is kept.

use super::*;

impl Scheduler {
    pub(super) fn carry_out(&mut self, effects: Vec<Effect>) {
        for effect in effects {
            match effect {
                Effect::Claim { model, place, run } => self.claim(&model, place, run),
                Effect::Order { model, replica, set, order, park_bytes, at_leisure } => {
                    match self.workers.get(&(model, replica)) {
                        Some(worker) if at_leisure => worker.load_at_leisure(set, park_bytes),
                        Some(worker) => worker.order_on(order, set, park_bytes),
                        None => tracing::error!(replica, ?order, "an order for a worker that has no supervisor"),
                    }
                }
                Effect::Fetch { model, want } => self.fetching.want(&model, want),
                Effect::EndFetch { model } => self.fetching.end(&model),
                Effect::Evict { numbers } => {
                    let stops = numbers.iter().filter_map(|number| self.stops.get(number));
                    stops.for_each(|stop| stop.evicted.cancel());
                }
                Effect::EndQueued { numbers, error, overdue } => {
                    let ending = if overdue { Ending::Expired(error) } else { Ending::Failed(error) };
                    self.end_queued(numbers, ending);
                }
                Effect::CancelQueued(numbers) => self.end_queued(numbers, Ending::Cancelled),
                Effect::TellLoading { numbers, model, eta } => self.tell(numbers, Told::Loading { model, eta }),
                Effect::AddLoadTime { numbers, load_ms } => {
                    let store = self.context.store.clone();
                    self.beside("add load time", async move { store.add_load_time(numbers, load_ms).await });
                }
                Effect::Learn { model, learned } => {
                    let kept = self.context.store.learn(model, learned);
                    self.beside("learn", kept);
                }
                Effect::Served(tenants) => {
                    let store = self.context.store.clone();
                    self.beside("keep what tenants were served", async move { store.keep_served(tenants).await });
                }
                Effect::Announce(decision) => {
                    tracing::info!(
                        decision.action = decision.action,
                        decision.code = decision.code,
                        "{}",
                        decision.reason
                    );
                }
            }
        }
    }

    /// Runs a write whose failure loses no job.
    fn beside<F>(&self, what: &'static str, write: F)
    where
        F: Future<Output = Result<(), StoreError>> + Send + 'static,
    {
        self.context.tasks.spawn("store write", async move {
            if let Err(error) = write.await {
                tracing::warn!("{what}: not stored: {error}");
            }
        });
    }

    fn claim(&mut self, model: &Arc<str>, place: Place, run: Run) {
        let number = self.next_run;
        self.next_run += 1;
        let now = self.context.clock.now();
        let numbers: Vec<i64> = run.jobs.iter().map(|job| job.number).collect();
        let mut stops = HashMap::with_capacity(numbers.len());
        for job in &run.jobs {
            let stop = Stop::default();
            self.stops.insert(job.number, stop.clone());
            stops.insert(job.number, stop);
            if !job.was_started {
                self.handle.observe_wait((now - job.created_at) as f64 / 1e3);
            }
        }
        let spec = self.models.iter().find(|spec| spec.name == **model);
        let endpoints = spec.map(|spec| spec.endpoints.clone());
        let claimed = self.context.store.claim_served(numbers, number, endpoints.clone());
        let (context, model) = (self.context.clone(), model.clone());
        self.context.tasks.spawn("claim", async move {
            match claimed.await {
                Ok((claims, unserved)) => {
                    let mut lost = lost(&run, &claims);
                    lost.retain(|number| !unserved.contains(number));
                    let count = claims.len();
                    let tag = (count > 1 && place.max_batch > 1).then(|| RunTag { id: format!("run_{number}"), count });
                    let names_shape = place.max_batch > 1;
                    for (nth, job) in claims.into_iter().enumerate() {
                        context.hub.publish(job.change.number, job.change.version, job.change.seq);
                        let Some(stop) = stops.remove(&job.change.number) else { continue };
                        let dispatch = Dispatch {
                            job,
                            model: model.clone(),
                            place: place.clone(),
                            run: tag.clone(),
                            alone: run.alone && count == 1,
                            run_jobs: u32::try_from(count).unwrap_or(u32::MAX),
                            names_shape: names_shape && nth == 0,
                            stop,
                        };
                        context.tasks.spawn("dispatch", dispatch::run(context.clone(), dispatch));
                    }
                    if !unserved.is_empty() {
                        let aside = run.jobs.iter().filter(|job| unserved.contains(&job.number));
                        let jobs = aside.map(|job| (job.priority, job.number)).collect();
                        let (model, endpoints) = (model.to_string(), endpoints.unwrap_or_default());
                        context.tell(Message::Unserved { model, endpoints, jobs, claimed: true });
                    }
                    if !lost.is_empty() {
                        context.tell(Message::Event(Event::Claimed { model, lost }));
                    }
                }
                Err(error) => {
                    let numbers = run.jobs.iter().map(|job| job.number).collect();
                    give_back(&context, model, numbers, &error).await;
                }
            }
        });
    }

    fn end_queued(&self, numbers: Vec<i64>, ending: Ending) {
        let context = self.context.clone();
        self.context.tasks.spawn("end queued", async move {
            end_all_queued(&context, &numbers, &ending).await;
        });
    }

    pub(super) fn tell(&self, numbers: Vec<i64>, what: Told) {
        if numbers.is_empty() {
            return;
        }
        let context = self.context.clone();
        self.context.tasks.spawn("tell loading", async move {
            match context.store.tell_loading(numbers, what).await {
                Ok(changes) => changes.iter().for_each(|c| context.hub.publish(c.number, c.version, c.seq)),
                Err(error) => tracing::warn!("job.loading was not stored: {error}"),
            }
        });
    }
}

/// Jobs of a run that were not queued any more.
pub(in crate::scheduler) fn lost(run: &Run, claims: &[ClaimedJob]) -> Vec<i64> {
    let is_claimed = |number| claims.iter().any(|claim| claim.change.number == number);
    run.jobs.iter().map(|job| job.number).filter(|number| !is_claimed(*number)).collect()
}

/// How waiting jobs end.
pub(super) enum Ending {
    Failed(JobError),
    Expired(JobError),
    Cancelled,
}

impl Ending {
    fn committed(&self) -> (JobState, End, JobError) {
        match self {
            Self::Failed(error) => (JobState::Failed, End::Failed(error.clone()), error.clone()),
            Self::Expired(error) => (JobState::Expired, End::Expired(error.clone()), error.clone()),
            Self::Cancelled => (JobState::Cancelled, End::Cancelled, store::cancelled_by_user()),
        }
    }
}

/// Ends waiting jobs, and says how many it were.
pub(super) async fn end_all_queued(context: &Context, numbers: &[i64], ending: &Ending) -> usize {
    let mut ended = 0;
    // Together, so that they share commits.
    for some in numbers.chunks(ENDED_AT_ONCE) {
        let all = join_all(some.iter().map(|number| end_one_queued(context, *number, ending))).await;
        ended += all.into_iter().filter(|ended| *ended).count();
    }
    ended
}

/// Ends a waiting job, trying again while the store refuses: the loop may have forgotten it already. False: it did not wait
/// any more.
async fn end_one_queued(context: &Context, number: i64, ending: &Ending) -> bool {
    let mut pause = dispatch::STORE_RETRY;
    loop {
        let (state, end, error) = ending.committed();
        match context.store.end_queued(number, end).await {
            Ok(Some(change)) => {
                let ended = Ended { state, answer: None, error: Some(error) };
                context.hub.end(number, change.version, change.seq, ended);
                context.tell(Message::EndedQueued { state });
                return true;
            }
            Ok(None) | Err(StoreError::Stopped) => return false,
            Err(error) => {
                tracing::error!(job.number = number, "a waiting job could not be ended, trying again: {error}")
            }
        }
        tokio::select! {
            () = tokio::time::sleep(pause) => pause = (pause * 2).min(dispatch::STORE_RETRY_MAX),
            () = context.tasks.hard().cancelled() => return false,
        }
    }
}

/// The store refused a claim: the jobs are still queued, and are tried again a little later.
async fn give_back(context: &Context, model: Arc<str>, numbers: Vec<i64>, error: &StoreError) {
    tracing::error!(model.name = %model, jobs = numbers.len(), "jobs could not be claimed, trying again: {error}");
    tokio::time::sleep(CLAIM_RETRY).await;
    context.tell(Message::Event(Event::Unclaimed { model, numbers }));
}
