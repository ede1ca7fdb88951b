use std::sync::Arc;

use proptest::prelude::*;

use super::*;

pub(crate) fn model(name: &str) -> ModelView {
    ModelView {
        paused: 0,
        wanted_at: None,
        name: Arc::from(name),
        pending_interactive: 0,
        pending_batch: 0,
        oldest_interactive: None,
        oldest_batch: None,
        first_deadline: None,
        last_deadline: None,
        left_at: None,
        gpus: 1,
        bytes: None,
        apart: false,
        lacked: Vec::new(),
        load_ms: 28_000.0,
        cold_ms: 28_000.0,
        parked: Vec::new(),
        bare: false,
        reload_ms: 28_000.0,
        stop_ms: 0.0,
        service_ms: 9_000.0,
        each_ms: 9_000.0,
        rate: 0.0,
        gap_ms: None,
        group: 1.0,
        trouble: None,
        trouble_until: None,
        preload: false,
        idle_ttl_ms: None,
        pin: false,
        max_replicas: 1,
    }
}

pub(crate) fn callers(mut m: ModelView, count: usize, oldest: Millis) -> ModelView {
    m.pending_interactive = count;
    m.oldest_interactive = Some(oldest);
    m
}

pub(crate) fn batch(mut m: ModelView, count: usize, oldest: Millis) -> ModelView {
    m.pending_batch = count;
    m.oldest_batch = Some(oldest);
    m
}

/// A worker of this model, with nothing running, on the first device.
pub(crate) fn serving(model: usize, since: Millis) -> WorkerView {
    WorkerView {
        model,
        set: GpuSet::one(0),
        phase: Phase::Serving,
        since,
        running: 0,
        callers: 0,
        idle_since: None,
        guest_until: None,
    }
}

fn on(worker: WorkerView, first: u32, count: u32) -> WorkerView {
    WorkerView { set: GpuSet { first, count }, ..worker }
}

pub(crate) fn one_device(models: Vec<ModelView>, workers: Vec<WorkerView>) -> View {
    View { devices: vec![1], gpus: 1, models, workers, ..View::default() }
}

const GB: u64 = 1_000_000_000;

/// A box with GPUs of 80 GB.
fn gpus(count: u32, models: Vec<ModelView>, workers: Vec<WorkerView>) -> View {
    View { devices: vec![80 * GB; count as usize], gpus: count, models, workers, ..View::default() }
}

fn sized(mut m: ModelView, gpus: u32, gb: u64) -> ModelView {
    (m.gpus, m.bytes) = (gpus, Some(gb * GB));
    m
}

/// What a plan does, as `load llama on gpu0` and `out flux`, in words of its own.
fn actions(view: &View, plan: &Plan) -> Vec<String> {
    let name = |worker: &usize| format!(" out {}", view.model_of(&view.workers[*worker]).name);
    plan.steps
        .iter()
        .map(|step| match &step.action {
            Action::Load { model, set, out, .. } => {
                format!("load {} on {set}{}", view.models[*model].name, out.iter().map(name).collect::<String>())
            }
            Action::Unload(worker) => format!("unload{}", name(worker)),
        })
        .collect()
}

struct Decided {
    actions: Vec<String>,
    code: &'static str,
    reason: String,
    wake_at: Option<Millis>,
    plan: Plan,
}

fn look(view: &View, now: Millis) -> Decided {
    let plan = plan(view, &Knobs::default(), now);
    let decision = plan.decision().expect("a reason").clone();
    Decided { actions: actions(view, &plan), code: decision.code, reason: decision.reason, wake_at: plan.wake_at, plan }
}

fn decide(workers: Vec<WorkerView>, models: Vec<ModelView>, now: Millis) -> Decided {
    look(&one_device(models, workers), now)
}

const NOW: Millis = 1_000_000_000;
const NOTHING: [&str; 0] = [];

#[test]
fn a_free_device_takes_the_model_that_is_due_first() {
    let models = vec![batch(model("flux"), 4, NOW - 9_000), callers(model("llama"), 1, NOW - 1_000)];
    let got = decide(vec![], models, NOW);
    assert_eq!((got.actions, got.code), (vec!["load llama on gpu0".to_owned()], "fits"), "{}", got.reason);
    assert_eq!(got.reason, "load llama: the device is free; 1 pending");
}

#[test]
fn a_resident_with_work_stays_while_nobody_is_due() {
    let models = vec![callers(model("flux"), 12, NOW), callers(model("llama"), 1, NOW - 8_000)];
    let got = decide(vec![serving(0, NOW - 500_000)], models, NOW);
    assert_eq!(got.actions, NOTHING);
    assert_eq!(got.code, "not_due");
    assert_eq!(
        got.reason,
        "stay on flux: 12 pending, swap costs 56 s (drain 0 + load 28 + reload 28), llama waits 8 s of 60 s"
    );
    assert_eq!(got.wake_at, Some(NOW + 52_000 - 28_000), "plans again when llama gets late");
}

#[test]
fn a_due_model_waits_for_the_hold_of_the_resident() {
    let mut cheap = callers(model("flux"), 12, NOW);
    (cheap.reload_ms, cheap.stop_ms) = (4_000.0, 9_000.0);
    let models = || vec![cheap.clone(), callers(model("llama"), 1, NOW - 63_000)];
    let got = decide(vec![serving(0, NOW - 95_000)], models(), NOW);
    assert_eq!(got.code, "hold");
    assert_eq!(
        got.reason,
        "stay on flux: llama is due (63 s of 60 s), flux has run 95 s of its 232 s hold (5.7 x 41 s)"
    );
    let hold = got.wake_at.expect("a time") - (NOW - 95_000);
    assert_eq!(hold, 232_334, "41 s x 0.85 / 0.15, and no ms less");
    // Woken at the very ms before, it is not over, and the same time is asked for again.
    let got = decide(vec![serving(0, NOW - 232_333)], models(), NOW);
    assert_eq!((got.code, got.wake_at), ("hold", Some(NOW + 1)), "{}", got.reason);
    assert_eq!(decide(vec![serving(0, NOW - 232_334)], models(), NOW).code, "due");
    let models = || vec![callers(model("flux"), 12, NOW), callers(model("llama"), 1, NOW - 63_000)];
    let got = decide(vec![serving(0, NOW - 95_000)], models(), NOW);
    assert!(got.reason.ends_with("flux has run 95 s of its 300 s hold (max_visit)"), "{}", got.reason);
    let got = decide(vec![serving(0, NOW - 301_000)], models(), NOW);
    assert_eq!(got.actions, ["load llama on gpu0 out flux"]);
    assert_eq!(got.code, "due");
    assert_eq!(got.reason, "swap flux -> llama: llama is due (63 s of 60 s), flux has run 301 s >= its 300 s hold");
}

#[test]
fn a_caller_displaces_batch_work_after_one_price() {
    let models = || vec![batch(model("flux"), 100, NOW), callers(model("llama"), 1, NOW - 52_000)];
    assert_eq!(decide(vec![serving(0, NOW - 50_000)], models(), NOW).code, "hold");
    let with_a_caller = WorkerView { running: 3, callers: 1, ..serving(0, NOW - 57_000) };
    assert_eq!(decide(vec![with_a_caller], models(), NOW).code, "hold", "it serves callers, too");
    let got = decide(vec![serving(0, NOW - 57_000)], models(), NOW);
    assert_eq!(got.code, "due_interactive");
    assert_eq!(
        got.reason,
        "swap flux -> llama: caller waiting 52 s, flux has batch work only and has run 57 s >= 56 s"
    );
}

#[test]
fn a_resident_about_to_finish_is_left_to_finish() {
    let models = || vec![batch(model("flux"), 2, NOW), callers(model("llama"), 1, NOW - 70_000)];
    let got = decide(vec![serving(0, NOW - 60_000)], models(), NOW);
    assert_eq!(got.code, "finish_first");
    assert_eq!(
        got.reason,
        "stay on flux: llama is due, but flux is done in about 18 s, less than the 56 s a swap costs"
    );
    let got = decide(vec![serving(0, NOW - 113_000)], models(), NOW);
    assert_eq!(got.code, "due_interactive", "but not for ever");
}

#[test]
fn a_dry_resident_makes_room_at_once() {
    let got = decide(vec![serving(0, NOW - 1)], vec![model("flux"), batch(model("tts"), 1, NOW)], NOW);
    assert_eq!(got.actions, ["load tts on gpu0 out flux"]);
    assert_eq!(got.code, "dry");
    assert_eq!(got.reason, "swap flux -> tts: flux is dry, tts due next (in 900 s; 1 pending)");
}

#[test]
fn a_deadline_makes_a_model_due() {
    let mut urgent = batch(model("llama"), 3, NOW);
    (urgent.first_deadline, urgent.last_deadline) = (Some(NOW + 60_000), Some(NOW + 70_000));
    let models = || vec![batch(model("flux"), 100, NOW), urgent.clone()];
    let got = decide(vec![serving(0, NOW - 400_000)], models(), NOW);
    assert_eq!(got.code, "deadline");
    assert_eq!(
        got.reason,
        "swap flux -> llama: llama must start by 13:46:59 to end by 13:47:50 (3 jobs x 9 s + load 28 s)"
    );
    // 70 s - 2 x 9 s - 1.2 x 3 x 9 s: all of its jobs, not only the first.
    assert_eq!(urgent.must_start(), Some(NOW + 19_600));
    let mut later = urgent.clone();
    later.first_deadline = Some(NOW + 600_000);
    later.last_deadline = Some(NOW + 600_000);
    assert_eq!(later.due(&Knobs::default()).map(|due| due.at), Some(NOW + 549_600));
}

#[test]
fn trouble_is_named_and_never_loaded() {
    let mut broken = callers(model("llama"), 3, NOW - 90_000);
    broken.trouble = Some("no GPU".into());
    broken.trouble_until = Some(NOW + 5_000);
    let got = decide(vec![], vec![broken], NOW);
    assert_eq!(got.actions, NOTHING);
    assert_eq!((got.code, got.wake_at), ("blocked", Some(NOW + 5_000)));
    assert_eq!(got.reason, "nothing can be loaded: llama (3 pending): no GPU");
}

#[test]
fn an_idle_model_is_unloaded_after_its_ttl_and_preload_fills_an_empty_device() {
    let mut m = model("tts");
    m.idle_ttl_ms = Some(10_000);
    m.preload = true;
    let idle = |since| vec![WorkerView { idle_since: Some(since), ..serving(0, 0) }];
    assert_eq!(decide(idle(NOW - 9_999), vec![m.clone()], NOW).wake_at, Some(NOW + 1));
    assert_eq!(decide(idle(NOW - 10_000), vec![m.clone()], NOW).actions, ["unload out tts"]);
    assert_eq!(decide(vec![], vec![m], NOW).actions, ["load tts on gpu0"]);
}

#[test]
fn a_displaced_model_is_not_due_again_before_it_has_been_away() {
    let mut m = callers(model("llama"), 1, NOW - 100_000);
    m.left_at = Some(NOW - 30_000);
    assert_eq!(m.due(&Knobs::default()).map(|due| due.at), Some(NOW - 30_000 + 180_000));
}

#[test]
fn a_model_that_fits_beside_the_residents_is_loaded_at_once() {
    let models = vec![
        callers(sized(model("llama"), 1, 38), 9, NOW),
        batch(sized(model("flux"), 1, 34), 1, NOW),
        batch(sized(model("big"), 1, 60), 1, NOW),
    ];
    let got = look(&gpus(1, models.clone(), vec![serving(0, NOW)]), NOW);
    assert_eq!(got.actions, ["load flux on gpu0"], "and 60 GB do not fit");
    assert_eq!(got.plan.steps[0].decision.reason, "load flux: it fits beside llama; 1 pending");
    let got = look(&gpus(2, models, vec![serving(0, NOW)]), NOW);
    assert_eq!(got.actions, ["load flux on gpu1"], "the emptier one; and then 60 GB fit nowhere");
}

#[test]
fn of_free_gpus_one_is_taken_where_no_parked_process_is_in_the_way() {
    let view = |gb: u64, lies: usize| {
        let models = vec![model("parked"), batch(sized(model("new"), 1, gb), 1, NOW)];
        let residues = vec![Residue { model: lies, set: GpuSet::one(0), bytes: 2 * GB }];
        look(&View { residues, ..gpus(2, models, Vec::new()) }, NOW).actions
    };
    assert_eq!(view(79, 0), ["load new on gpu1"]);
    assert_eq!(view(78, 0), ["load new on gpu0"], "it fits beside that");
    assert_eq!(view(79, 1), ["load new on gpu0"], "it is its own");
}

#[test]
fn an_idle_model_that_is_missed_least_makes_room() {
    let idle = |name: &str, rate: f64| ModelView { rate, ..sized(model(name), 1, 50) };
    let models = vec![idle("busy", 0.01), idle("rare", 0.0001), batch(sized(model("new"), 1, 60), 1, NOW)];
    let workers = vec![on(serving(0, 0), 0, 1), on(serving(1, 0), 1, 1)];
    let got = look(&gpus(2, models, workers), NOW);
    assert_eq!(got.actions, ["load new on gpu1 out rare"]);
}

/// A model with a job on a box of two GPUs, parked on the second one: a wake takes 3 s, a load from disk 28 s.
fn parked_on_second(workers: Vec<WorkerView>, idle: ModelView) -> Decided {
    let there = vec![GpuSet::one(1)];
    let parked = ModelView { load_ms: 3_000.0, parked: there, ..batch(sized(model("new"), 1, 60), 1, NOW) };
    look(&gpus(2, vec![parked, sized(idle, 1, 50)], workers), NOW)
}

#[test]
fn a_parked_model_goes_where_it_can_wake() {
    let got = parked_on_second(Vec::new(), model("idle"));
    assert_eq!(got.actions, ["load new on gpu1"], "both are free");
    assert_eq!(got.plan.steps[0].decision.reason, "wake new on gpu1: the device is free; 1 pending");
    let there = || vec![on(serving(1, 0), 1, 1)];
    // To bring the idle one back costs less than a wake saves, or more.
    let idle = |reload_ms: f64| ModelView { reload_ms, ..model("idle") };
    let got = parked_on_second(there(), idle(20_000.0));
    assert_eq!(got.actions, ["load new on gpu1 out idle"]);
    let reason = &got.plan.steps[0].decision.reason;
    assert!(reason.ends_with("; it wakes from host memory, in 3 s"), "{reason}");
    let got = parked_on_second(there(), idle(26_000.0));
    assert_eq!(got.actions, ["load new on gpu0"]);
    assert_eq!(got.plan.steps[0].decision.reason, "load new on gpu0: the device is free; 1 pending");
}

#[test]
fn a_pinned_model_is_never_displaced() {
    let mut pinned = model("pinned");
    pinned.pin = true;
    let got = decide(vec![serving(0, 0)], vec![pinned, callers(model("llama"), 1, NOW - 900_000)], NOW);
    assert_eq!(got.actions, NOTHING);
    assert_eq!(got.code, "blocked");
}

/// Four GPUs: two models with work on one each, the rest idle; a model that needs all of them is late.
fn contended(flux_since: Millis) -> View {
    let busy = |name: &str| callers(sized(model(name), 1, 60), 50, NOW);
    let models = vec![
        busy("llama"),
        busy("flux"),
        callers(sized(model("big4"), 4, 74), 1, NOW - 100_000),
        callers(ModelView { load_ms: 5_000.0, ..sized(model("tts"), 1, 60) }, 1, NOW - 1_000),
    ];
    gpus(4, models, vec![on(serving(0, NOW - 310_000), 0, 1), on(serving(1, flux_since), 1, 1)])
}

#[test]
fn a_late_model_for_all_gpus_reserves_them_and_guests_fill_the_gap() {
    let view = contended(NOW - 100_000);
    let got = look(&view, NOW);
    assert_eq!(got.actions, ["load tts on gpu2"]);
    let Action::Load { guest_until, .. } = got.plan.steps[0].action else { panic!("{:?}", got.plan) };
    // The last of them to yield: flux, 300 s after it was ready.
    assert_eq!(guest_until, Some(NOW + 200_000));
    assert_eq!(got.reason, "load tts on gpu2 for at most 200 s: gpu0-3 are reserved for big4 from 13:50:00");
    assert_eq!(got.wake_at, Some(NOW + 200_000));
    // Three loads of 5 s do not fit into the last 14 s.
    let got = look(&contended(NOW - 286_000), NOW);
    assert_eq!(got.actions, NOTHING);
    assert!(got.plan.stays.iter().any(|d| d.code == "reserved" && d.model.as_deref() == Some("tts")));
}

#[test]
fn a_guest_makes_room_when_its_time_is_over_whatever_its_hold() {
    let mut view = contended(NOW - 300_000);
    view.workers[0].since = NOW - 300_000;
    view.models[3] = callers(sized(model("tts"), 1, 60), 20, NOW);
    view.workers.push(WorkerView { guest_until: Some(NOW), ..on(serving(3, NOW - 20_000), 2, 1) });
    let got = look(&view, NOW);
    assert_eq!(got.actions, ["load big4 on gpu0-3 out llama out flux out tts"], "{}", got.reason);
    view.workers[2].guest_until = None;
    assert_eq!(look(&view, NOW).actions, NOTHING, "as a resident it has its hold");
}

#[test]
fn a_load_is_not_broken_off() {
    let models = vec![model("flux"), callers(model("llama"), 1, NOW - 900_000)];
    for guest_until in [None, Some(NOW - 10_000)] {
        let phase = Phase::Loading { until: NOW - 500_000 };
        let got = decide(vec![WorkerView { phase, guest_until, ..serving(0, NOW) }], models.clone(), NOW);
        assert_eq!((got.actions, got.wake_at), (vec![], None), "{}", got.reason);
        assert_eq!(got.reason, "stay on flux: it is being loaded; llama waits 900 s of 60 s");
    }
}

#[test]
fn one_more_worker_for_a_long_backlog_while_nobody_waits() {
    let mut llama = callers(sized(model("llama"), 1, 60), 10, NOW);
    llama.max_replicas = 2;
    let view = |models| gpus(2, models, vec![serving(0, NOW)]);
    let got = look(&view(vec![llama.clone(), sized(model("flux"), 1, 60)]), NOW);
    assert_eq!(got.actions, ["load llama on gpu1"]);
    assert_eq!(got.code, "replica");
    let somebody = vec![llama.clone(), batch(sized(model("flux"), 1, 60), 1, NOW)];
    assert_eq!(look(&view(somebody), NOW).actions, ["load flux on gpu1"]);
    llama.pending_interactive = 9;
    assert_eq!(look(&view(vec![llama.clone()]), NOW).actions, NOTHING, "81 s are not more than 3 x 28 s");
    // A replica makes room at once, whatever its work; the last worker does not.
    let models = vec![callers(llama, 50, NOW), batch(sized(model("flux"), 1, 60), 1, NOW)];
    let workers = vec![on(serving(0, NOW), 0, 1), on(serving(0, NOW), 1, 1)];
    assert_eq!(look(&gpus(2, models.clone(), workers.clone()), NOW).actions, ["load flux on gpu0 out llama"]);
    let both = |oldest| vec![models[0].clone(), batch(sized(model("pair"), 2, 60), 1, oldest)];
    assert_eq!(look(&gpus(2, both(NOW), workers.clone()), NOW).actions, NOTHING);
    // But it does when its hold is over: else a model that needs both would wait for ever.
    let held = |ran| vec![on(serving(0, NOW - ran), 0, 1), on(serving(0, NOW - ran + 10_000), 1, 1)];
    let got = look(&gpus(2, both(NOW - 910_000), held(299_000)), NOW);
    assert_eq!((got.actions, got.wake_at), (vec![], Some(NOW + 1_000)), "{}", got.reason);
    assert_eq!(got.plan.reservations.len(), 1);
    let got = look(&gpus(2, both(NOW - 910_000), held(300_000)), NOW);
    assert_eq!(got.actions, ["load pair on gpu0-1 out llama out llama"]);
    assert_eq!(got.reason, "swap llama -> pair: pair is due (910 s of 900 s), llama has run 300 s >= its 300 s hold");
}

#[test]
fn a_dry_model_lingers_for_a_caller_who_comes_back_at_once() {
    let idle = |since| vec![WorkerView { idle_since: Some(since), ..serving(0, NOW - 5_000) }];
    let models = |gap| {
        let mut m = model("llama");
        m.gap_ms = gap;
        vec![m, callers(model("flux"), 1, NOW - 1_000)]
    };
    let got = decide(idle(NOW), models(Some(300.0)), NOW);
    assert_eq!(got.actions, NOTHING);
    assert_eq!((got.code, got.wake_at), ("linger", Some(NOW + 600)));
    assert_eq!(
        got.reason,
        "stay on llama: its next job is expected in about 0.3 s, less than the 56 s a swap costs; flux waits 1 s of 60 s"
    );
    assert_eq!(decide(idle(NOW - 600), models(Some(300.0)), NOW).code, "dry", "it did not come");
    assert_eq!(decide(idle(NOW), models(None), NOW).code, "dry", "nothing is known");
    assert_eq!(decide(idle(NOW), models(Some(20_000.0)), NOW).code, "dry", "it would take too long");
    let mut grouped = models(Some(300.0));
    grouped[0].group = 50.0;
    assert_eq!(decide(idle(NOW), grouped, NOW).code, "dry", "its jobs come in groups: one swap serves many");
    // A late model does not wait longer than for one with work.
    let mut late = models(Some(300.0));
    late[1].oldest_interactive = Some(NOW - 90_000);
    let worker = WorkerView { idle_since: Some(NOW), ..serving(0, NOW - 400_000) };
    assert_eq!(decide(vec![worker], late, NOW).code, "dry");
}

/// Plays a closed little world by the plan alone: jobs arrive, one at a time is served, loads take their time. Returns the
/// longest time any model waited with pending jobs, the swaps, and whether the device was ever idle beside loadable work.
fn play(arrivals: &[(Millis, usize, bool)], models: usize, load_ms: i64, job_ms: i64) -> (Millis, usize) {
    let knobs = Knobs::default();
    let mut views: Vec<ModelView> = (0..models)
        .map(|i| {
            let mut m = model(&format!("m{i}"));
            (m.load_ms, m.service_ms, m.each_ms) = (load_ms as f64, job_ms as f64, job_ms as f64);
            m.reload_ms = m.load_ms;
            m
        })
        .collect();
    let mut queues: Vec<Vec<(Millis, bool)>> = vec![Vec::new(); models];
    let mut waiting_since: Vec<Option<Millis>> = vec![None; models];
    let (mut now, mut next, mut since, mut holder) = (0, 0, 0, None::<usize>);
    let (mut longest, mut swaps) = (0, 0);
    loop {
        while next < arrivals.len() && arrivals[next].0 <= now {
            let (at, m, interactive) = arrivals[next];
            queues[m].push((at, interactive));
            if holder != Some(m) {
                waiting_since[m].get_or_insert(at);
            }
            next += 1;
        }
        for (view, queue) in views.iter_mut().zip(&queues) {
            view.pending_interactive = queue.iter().filter(|(_, i)| *i).count();
            view.pending_batch = queue.len() - view.pending_interactive;
            view.oldest_interactive = queue.iter().filter(|(_, i)| *i).map(|(at, _)| *at).min();
            view.oldest_batch = queue.iter().filter(|(_, i)| !*i).map(|(at, _)| *at).min();
        }
        let workers = holder.map(|holder| serving(holder, since)).into_iter().collect();
        let decided = plan(&one_device(views.clone(), workers), &knobs, now);
        match decided.steps.first().map(|step| &step.action) {
            Some(Action::Load { model: index, .. }) => {
                swaps += 1;
                if let Some(old) = holder {
                    views[old].left_at = Some(now);
                    if !queues[old].is_empty() {
                        waiting_since[old] = Some(now);
                    }
                }
                now += load_ms;
                (since, holder) = (now, Some(*index));
                if let Some(since) = waiting_since[*index].take() {
                    longest = longest.max(now - since);
                }
            }
            Some(Action::Unload(_)) => unreachable!("no ttl"),
            None => match holder.filter(|h| !queues[*h].is_empty()) {
                Some(h) => {
                    let first = queues[h].iter().position(|(_, interactive)| *interactive).unwrap_or(0);
                    queues[h].remove(first);
                    now += job_ms;
                }
                None => {
                    assert!(queues.iter().all(Vec::is_empty), "idle beside work: {:?}", decided.decision());
                    let Some((at, ..)) = arrivals.get(next) else {
                        return (longest, swaps);
                    };
                    now = now.max(*at);
                }
            },
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// The bound of the policy: B = C + (M - 1)(H + D + L) + L, under overload too.
    #[test]
    fn nobody_waits_beyond_the_bound(
        seeds in prop::collection::vec((0i64..400, 0usize..4, any::<bool>()), 1..300),
        load_s in 1i64..60,
        job_s in 1i64..15,
    ) {
        let mut at = 0;
        let arrivals: Vec<_> = seeds.iter().map(|(gap, m, i)| { at += gap * 20; (at, *m, *i) }).collect();
        let (load, job) = (load_s * 1000, job_s * 1000);
        let (longest, _) = play(&arrivals, 4, load, job);
        let price = 2 * load + 2 * job;
        let visit = 300_000.max(price) + price;
        let bound = 900_000 + 3 * (visit + job + load) + load;
        prop_assert!(longest <= bound, "waited {longest} ms, bound {bound} ms");
    }

    #[test]
    fn due_is_never_before_the_model_left(left in 0i64..NOW, oldest in 0i64..NOW) {
        let mut m = callers(model("a"), 1, oldest);
        m.left_at = Some(left);
        m.first_deadline = Some(oldest);
        prop_assert!(m.due(&Knobs::default()).expect("pending").at >= left);
    }
}

#[test]
fn alternating_arrivals_are_grouped() {
    let arrivals: Vec<_> = (0..60).map(|i| (i * 16, usize::try_from(i % 3).expect("small"), false)).collect();
    let (_, swaps) = play(&arrivals, 3, 2_000, 50);
    assert!(swaps <= 4, "{swaps} loads for 60 jobs of 3 models");
}
