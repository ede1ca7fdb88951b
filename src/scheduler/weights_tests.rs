use super::tests::{job, spec};
use super::*;
use crate::domain::worker::{Fetch, FetchPhase};
use crate::domain::{Face, Launch};

/// Two models that fill the only GPU. The weights of the first come from a hub, and are not here.
struct Desk {
    state: State,
    now: Millis,
    effects: Vec<Effect>,
    /// The last one, which reports answer.
    want: u64,
}

fn from_hub() -> ModelSpec {
    ModelSpec {
        launch: Launch::Script { python: "python3".into(), script: "/server.py".into() },
        model: Some("org/big".to_owned()),
        gpus: 1,
        ..spec("hub", 4)
    }
}

impl Desk {
    fn new() -> Self {
        let here = ModelSpec { gpus: 1, ..spec("here", 4) };
        let gpus = [(0, 80 << 30)].into();
        let state = State::new(&[from_hub(), here], Knobs::default(), &BTreeMap::new(), 1)
            .on(Inventory::of(&gpus, 64 << 30))
            .without_weights(&["hub".to_owned()].into());
        let mut desk = Self { state, now: 1_000, effects: Vec::new(), want: 0 };
        desk.step();
        desk
    }

    fn step(&mut self) {
        let effects = self.state.step(self.now);
        let want = |effect: &Effect| if let Effect::Fetch { want, .. } = effect { Some(*want) } else { None };
        self.want = effects.iter().filter_map(want).next_back().unwrap_or(self.want);
        self.effects.extend(effects);
    }

    fn event(&mut self, event: Event) {
        let effects = self.state.on_event(event, self.now);
        self.effects.extend(effects);
        self.step();
    }

    fn fetch(&mut self, report: FetchReport) {
        self.fetch_for(self.want, report);
    }

    fn fetch_for(&mut self, want: u64, report: FetchReport) {
        self.event(Event::Fetch { model: "hub".to_owned(), want, report: Box::new(report) });
    }

    fn report(&mut self, model: &str, report: Report) {
        self.event(Event::Report { model: model.to_owned(), replica: 0, report });
    }

    /// What is to be done since the last look, but for telling and keeping.
    fn asked(&mut self) -> Vec<String> {
        let word = |effect: Effect| match effect {
            Effect::Fetch { model, .. } => Some(format!("fetch {model}")),
            Effect::EndFetch { model } => Some(format!("end fetch of {model}")),
            Effect::Order { order: Order::Proven, .. } => None,
            Effect::Order { model, order, .. } => Some(format!("{order:?} {model}").to_lowercase()),
            Effect::Claim { model, run, .. } => Some(format!("claim {} of {model}", run.jobs.len())),
            Effect::EndQueued { numbers, error, .. } => Some(format!("end {numbers:?} {}", error.code)),
            _ => None,
        };
        self.effects.drain(..).filter_map(word).collect()
    }

    fn why(&self) -> String {
        self.state.why("hub", Some(0), None, self.now).unwrap()
    }
}

fn half_way() -> Fetch {
    Fetch {
        bytes: 8_000_000_000,
        total_bytes: Some(16_000_000_000),
        percent: Some(50.0),
        bytes_per_s: Some(80e6),
        eta_s: Some(100.0),
        ..Fetch::at(FetchPhase::Fetching)
    }
}

const TOLD: &str = "model `hub`: its weights cannot be fetched: 403";

fn no_access() -> FetchReport {
    let fetch = Fetch { retry_at: Some(99_000), reason: Some("403".to_owned()), ..Fetch::at(FetchPhase::Failed) };
    FetchReport::Failed { fetch, error: JobError::new(ErrorCode::ModelLoadFailed, TOLD, true) }
}

#[test]
fn weights_are_asked_for_once_when_somebody_wants_the_model_and_it_loads_when_they_are_here() {
    let mut desk = Desk::new();
    assert!(desk.asked().is_empty(), "nobody wants it");
    desk.event(Event::Queued(vec![job(1, "hub")]));
    desk.event(Event::Queued(vec![job(2, "hub")]));
    assert_eq!(desk.asked(), ["fetch hub"]);
    desk.fetch(FetchReport::Progress(half_way()));
    assert!(desk.asked().is_empty(), "no device is given to it");
    assert_eq!(
        desk.why(),
        "hub cannot be loaded yet: its weights are being fetched: 8.00 of 16.00 GB (50 %), 80.0 MB/s, about 100 s left"
    );
    assert!(desk.state.expected("hub", 5, 1, desk.now).is_none());
    desk.fetch(FetchReport::Here);
    assert_eq!(desk.asked(), ["load hub"]);
    desk.report("hub", Report::Ready { base_url: "http://hub".to_owned(), load_ms: 2_000 });
    assert_eq!(desk.asked(), ["claim 1 of hub", "claim 1 of hub"]);
    let learned = &desk.state.models[0].learned;
    assert_eq!(learned.load_ms, Some(2_000.0), "the load alone, without the fetch");
}

#[test]
fn others_have_the_devices_meanwhile_and_leave_them_for_nothing() {
    let mut desk = Desk::new();
    desk.event(Event::Queued(vec![job(1, "hub"), job(2, "here")]));
    assert_eq!(desk.asked(), ["fetch hub", "load here"]);
    desk.report("here", Report::Ready { base_url: "http://here".to_owned(), load_ms: 2_000 });
    assert_eq!(desk.asked(), ["claim 1 of here"]);
    desk.event(Event::Ended { model: "here".into(), number: 2, answered: true, suspect: false, back: None });
    // Long after its turn would have been due.
    desk.now += 3_600_000;
    desk.fetch(FetchReport::Progress(half_way()));
    desk.event(Event::Queued(vec![job(3, "here")]));
    assert_eq!(desk.asked(), ["claim 1 of here"], "it stays where it is");
    assert!(desk.state.reservations.is_empty());
    desk.event(Event::Ended { model: "here".into(), number: 3, answered: true, suspect: false, back: None });
    desk.fetch(FetchReport::Here);
    assert_eq!(desk.asked(), ["stop here"], "now it makes room");
}

#[test]
fn progress_alone_makes_no_new_plan() {
    let mut desk = Desk::new();
    desk.event(Event::Queued(vec![job(1, "hub")]));
    desk.fetch(FetchReport::Progress(half_way()));
    let planned_at = desk.state.planned_at;
    desk.now += 1;
    desk.fetch(FetchReport::Progress(half_way()));
    assert_eq!(desk.state.planned_at, planned_at);
}

#[test]
fn weights_that_cannot_be_had_end_callers_and_keep_jobs() {
    let mut desk = Desk::new();
    let caller = QueuedJob { face: Face::Sync, ..job(1, "hub") };
    desk.event(Event::Queued(vec![caller, job(2, "hub")]));
    desk.fetch(no_access());
    assert_eq!(desk.asked(), ["fetch hub", "end [1] model_load_failed"]);
    assert_eq!(desk.state.refusal("hub").unwrap().message, TOLD, "the next caller is told at once");
    assert_eq!(desk.why(), "hub cannot be loaded now: its weights cannot be fetched: 403");
    assert_eq!(desk.state.queued(), 1);
    // Not again before the pause is over.
    desk.event(Event::Queued(vec![job(3, "hub")]));
    assert!(desk.asked().is_empty());
    desk.fetch(FetchReport::Available);
    assert_eq!(desk.asked(), ["fetch hub"]);
    assert!(desk.state.refusal("hub").is_none());
}

#[test]
fn why_a_fetch_failed_is_told_until_bytes_come_or_somebody_asks_for_a_retry() {
    let failure = |desk: &Desk| desk.state.models[0].lack.as_ref().and_then(|lack| lack.failure.clone());
    let at = |phase, reason: Option<&str>| {
        FetchReport::Progress(Fetch { reason: reason.map(str::to_owned), ..Fetch::at(phase) })
    };
    let because = |why: &str| Some(format!("the last try to fetch its weights failed: {why}"));
    let mut desk = Desk::new();
    desk.event(Event::Queued(vec![QueuedJob { face: Face::Sync, ..job(1, "hub") }]));
    desk.fetch(at(FetchPhase::Listing, None));
    assert_eq!(failure(&desk), None);
    desk.fetch(at(FetchPhase::Listing, Some("no way there")));
    assert_eq!(failure(&desk), because("no way there"), "while it is tried again");
    desk.fetch(at(FetchPhase::Listing, None));
    assert_eq!(failure(&desk), because("no way there"));
    desk.fetch(at(FetchPhase::Fetching, None));
    assert_eq!(failure(&desk), None, "bytes come");
    desk.fetch(at(FetchPhase::Fetching, Some("no byte")));
    assert_eq!(failure(&desk).as_deref(), Some("its weights do not come now: no byte"), "no try has failed");
    desk.fetch(no_access());
    assert_eq!(failure(&desk), because("403"));
    desk.fetch(FetchReport::Available);
    assert_eq!(failure(&desk), because("403"), "nobody waits for it any more");
    desk.event(Event::Queued(vec![job(2, "hub")]));
    assert_eq!(failure(&desk), because("403"));
    desk.fetch(FetchReport::Forgiven);
    assert_eq!(failure(&desk), None, "a person says that it is mended");
    desk.fetch(no_access());
    desk.fetch(FetchReport::Here);
    assert_eq!(failure(&desk), None);
}

#[test]
fn what_a_gpu_lacks_is_told_before_what_is_missing_of_the_weights() {
    let mut desk = Desk::new();
    desk.event(Event::Devices(BTreeMap::new()));
    desk.event(Event::Queued(vec![job(1, "hub")]));
    assert!(desk.asked().is_empty(), "it could not be loaded with its weights either");
    assert_eq!(desk.state.models[0].blocked().unwrap().reason, StateReason::NoGpu);
    desk.event(Event::Devices([(0, 80 << 30)].into()));
    assert_eq!(desk.asked(), ["fetch hub"]);
}

#[test]
fn after_a_failed_load_the_weights_are_looked_for_again() {
    let mut desk = Desk::new();
    desk.event(Event::Queued(vec![job(1, "hub")]));
    desk.fetch(FetchReport::Here);
    assert_eq!(desk.asked(), ["fetch hub", "load hub"]);
    let error = JobError::new(ErrorCode::ModelLoadFailed, "a file is gone", true);
    desk.report("hub", Report::LoadFailed { error, retry_at: desk.now + 10_000, quarantined: false });
    assert_eq!(desk.asked(), ["fetch hub"]);
    desk.fetch(FetchReport::Here);
    assert!(desk.asked().is_empty(), "the pause after the failed load goes on");
    desk.report("hub", Report::Available);
    assert_eq!(desk.asked(), ["load hub"]);
}

#[test]
fn an_edit_of_other_keys_leaves_a_fetch_and_its_pause_as_they_are() {
    let mut desk = Desk::new();
    let edit = |desk: &mut Desk, before: &ModelSpec, after: &ModelSpec| {
        desk.event(Event::Edited(edits(std::slice::from_ref(before), std::slice::from_ref(after))));
    };
    let before = from_hub();
    desk.event(Event::Queued(vec![job(1, "hub")]));
    desk.fetch(FetchReport::Progress(half_way()));
    let smaller = ModelSpec { memory: Some(8 << 30), args: vec!["--less".into()], ..before.clone() };
    edit(&mut desk, &before, &smaller);
    assert_eq!(desk.asked(), ["fetch hub"], "once");
    assert!(desk.why().contains("8.00 of 16.00 GB"), "{}", desk.why());
    desk.fetch(no_access());
    edit(&mut desk, &smaller, &before);
    assert!(desk.asked().is_empty() && desk.why().ends_with("cannot be fetched: 403"), "{}", desk.why());
    let another = ModelSpec { revision: Some("v2".into()), ..before.clone() };
    edit(&mut desk, &before, &another);
    assert_eq!(desk.asked(), ["fetch hub"], "these are others");
}

#[test]
fn what_is_loaded_by_hand_is_fetched_first() {
    let mut desk = Desk::new();
    desk.event(Event::Control(Control::Load("hub".to_owned())));
    assert_eq!(desk.asked(), ["fetch hub"]);
    desk.fetch(FetchReport::Here);
    assert_eq!(desk.asked(), ["load hub"]);
}

#[test]
fn an_unload_by_hand_ends_a_fetch_until_somebody_wants_the_model_again() {
    let mut desk = Desk::new();
    let unload = || Event::Control(Control::Unload("hub".to_owned()));
    desk.event(Event::Control(Control::Load("hub".to_owned())));
    desk.fetch(FetchReport::Progress(half_way()));
    desk.event(unload());
    assert_eq!(desk.asked(), ["fetch hub", "end fetch of hub"], "and nobody asks for it again");
    let said = desk.state.decisions().next().unwrap();
    let words = "unload hub: the fetch of its weights was ended by hand at 8.00 of 16.00 GB (50 %); it goes on from there when \
                 it is wanted";
    assert_eq!((said.action, said.code, said.reason.as_str()), ("unload", "manual", words));
    // What was under way.
    desk.fetch(FetchReport::Progress(half_way()));
    desk.fetch(no_access());
    assert_eq!(desk.state.models[0].lack.as_ref().unwrap().fetch, None);
    assert!(desk.state.refusal("hub").is_none());
    desk.event(unload());
    assert!(desk.asked().is_empty(), "nothing is left to be ended");

    desk.event(Event::Queued(vec![job(1, "hub")]));
    assert_eq!(desk.asked(), ["fetch hub"]);
    desk.event(unload());
    assert_eq!(desk.asked(), ["end fetch of hub", "fetch hub"], "who waits brings it back");
    desk.event(Event::Control(Control::Pause(Some("hub".to_owned()))));
    desk.event(unload());
    assert_eq!(desk.asked(), ["end fetch of hub"], "but for a pause");
    desk.event(Event::Control(Control::Resume(Some("hub".to_owned()))));
    assert_eq!(desk.asked(), ["fetch hub"]);
    desk.fetch(FetchReport::Here);
    assert_eq!(desk.asked(), ["load hub"]);
}

#[test]
fn what_a_fetch_that_was_ended_still_says_is_not_taken_for_that_of_the_next() {
    let mut desk = Desk::new();
    let caller = QueuedJob { face: Face::Sync, ..job(1, "hub") };
    desk.event(Event::Queued(vec![caller]));
    desk.fetch(FetchReport::Progress(half_way()));
    let ended = desk.want;
    desk.event(Event::Control(Control::Unload("hub".to_owned())));
    assert_eq!(desk.asked(), ["fetch hub", "end fetch of hub", "fetch hub"], "who waits brings it back");
    for late in [FetchReport::Progress(half_way()), no_access(), FetchReport::Available, FetchReport::Here] {
        desk.fetch_for(ended, late);
        assert_eq!(desk.state.models[0].lack.as_ref().expect("not here").fetch, None);
    }
    assert!(desk.asked().is_empty() && desk.state.refusal("hub").is_none(), "nobody is told that it failed");
    desk.fetch(FetchReport::Progress(half_way()));
    assert!(desk.state.models[0].lack.as_ref().unwrap().fetch.is_some());
    desk.fetch(no_access());
    assert_eq!(desk.asked(), ["end [1] model_load_failed"], "that of the next one counts");
}
