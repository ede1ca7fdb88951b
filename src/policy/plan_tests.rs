use super::*;
use proptest::prelude::*;

fn model(name: &str) -> ModelView {
    ModelView {
        name: name.to_owned(),
        pending_interactive: 0,
        pending_batch: 0,
        running: 0,
        oldest_interactive: None,
        oldest_batch: None,
        first_deadline: None,
        left_at: None,
        load_ms: 28_000.0,
        stop_ms: 0.0,
        service_ms: 9_000.0,
        each_ms: 9_000.0,
        rate: 0.0,
        trouble: None,
        trouble_until: None,
        preload: false,
        idle_ttl_ms: None,
    }
}

fn callers(mut m: ModelView, count: usize, oldest: Millis) -> ModelView {
    m.pending_interactive = count;
    m.oldest_interactive = Some(oldest);
    m
}

fn batch(mut m: ModelView, count: usize, oldest: Millis) -> ModelView {
    m.pending_batch = count;
    m.oldest_batch = Some(oldest);
    m
}

fn serving(name: &str, since: Millis) -> DeviceView {
    DeviceView::Serving { model: name.to_owned(), since, idle_since: None }
}

fn decide(device: DeviceView, models: Vec<ModelView>, now: Millis) -> Plan {
    plan(&View { device, models }, &Knobs::default(), now)
}

const NOW: Millis = 1_000_000_000;

#[test]
fn a_free_device_takes_the_model_that_is_due_first() {
    let plan = decide(
        DeviceView::Empty,
        vec![batch(model("flux"), 4, NOW - 9_000), callers(model("llama"), 1, NOW - 1_000)],
        NOW,
    );
    assert_eq!(plan.action, Action::Load("llama".into()), "{}", plan.decision.reason);
    assert_eq!(plan.decision.code, "fits");
}

#[test]
fn a_resident_with_work_stays_while_nobody_is_due() {
    let plan = decide(
        serving("flux", NOW - 500_000),
        vec![callers(model("flux"), 12, NOW), callers(model("llama"), 1, NOW - 8_000)],
        NOW,
    );
    assert_eq!((plan.action, plan.decision.code), (Action::Stay, "not_due"));
    assert_eq!(
        plan.decision.reason,
        "stay on flux: 12 pending, swap costs 56 s (drain 0.0 s + load 28 s + reload 28 s), llama is due in 52 s (caller waits 8.0 s of 60 s)"
    );
    assert_eq!(plan.wake_at, Some(NOW + 52_000 - 28_000), "plans again when llama gets late");
}

#[test]
fn a_due_model_waits_for_the_hold_of_the_resident() {
    let models = || vec![callers(model("flux"), 12, NOW), callers(model("llama"), 1, NOW - 63_000)];
    let plan = decide(serving("flux", NOW - 95_000), models(), NOW);
    assert_eq!(plan.decision.code, "hold", "{}", plan.decision.reason);
    let hold = plan.wake_at.expect("a time") - (NOW - 95_000);
    assert_eq!(hold, 300_000, "6 x 56 s is cut at max_visit");
    let plan = decide(serving("flux", NOW - 301_000), models(), NOW);
    assert_eq!(plan.action, Action::Swap { from: "flux".into(), to: "llama".into() });
    assert_eq!(plan.decision.code, "due");
}

#[test]
fn a_caller_displaces_batch_work_after_one_price() {
    let models = || vec![batch(model("flux"), 100, NOW), callers(model("llama"), 1, NOW - 52_000)];
    assert_eq!(decide(serving("flux", NOW - 50_000), models(), NOW).decision.code, "hold");
    let plan = decide(serving("flux", NOW - 57_000), models(), NOW);
    assert_eq!(plan.decision.code, "due_interactive", "{}", plan.decision.reason);
}

#[test]
fn a_resident_about_to_finish_is_left_to_finish() {
    let models = || vec![batch(model("flux"), 2, NOW), callers(model("llama"), 1, NOW - 70_000)];
    let plan = decide(serving("flux", NOW - 60_000), models(), NOW);
    assert_eq!(plan.decision.code, "finish_first", "{}", plan.decision.reason);
    let plan = decide(serving("flux", NOW - 113_000), models(), NOW);
    assert_eq!(plan.decision.code, "due_interactive", "but not for ever");
}

#[test]
fn a_dry_resident_makes_room_at_once() {
    let plan = decide(serving("flux", NOW - 1), vec![model("flux"), batch(model("tts"), 1, NOW)], NOW);
    assert_eq!(plan.action, Action::Swap { from: "flux".into(), to: "tts".into() });
    assert_eq!(plan.decision.code, "dry");
}

#[test]
fn a_deadline_makes_a_model_due() {
    let mut urgent = batch(model("llama"), 1, NOW);
    urgent.first_deadline = Some(NOW + 80_000);
    let plan = decide(serving("flux", NOW - 400_000), vec![batch(model("flux"), 100, NOW), urgent], NOW);
    assert_eq!(plan.decision.code, "deadline", "{}", plan.decision.reason);
}

#[test]
fn trouble_is_named_and_never_loaded() {
    let mut broken = callers(model("llama"), 3, NOW - 90_000);
    broken.trouble = Some("no GPU".into());
    broken.trouble_until = Some(NOW + 5_000);
    let plan = decide(DeviceView::Empty, vec![broken], NOW);
    assert_eq!((plan.action, plan.decision.code, plan.wake_at), (Action::Stay, "blocked", Some(NOW + 5_000)));
    assert_eq!(plan.decision.reason, "nothing can be loaded: llama (3 pending): no GPU");
}

#[test]
fn an_idle_model_is_unloaded_after_its_ttl_and_preload_fills_an_empty_device() {
    let mut m = model("tts");
    m.idle_ttl_ms = Some(10_000);
    m.preload = true;
    let idle = |since| DeviceView::Serving { model: "tts".into(), since: 0, idle_since: Some(since) };
    assert_eq!(decide(idle(NOW - 9_999), vec![m.clone()], NOW).wake_at, Some(NOW + 1));
    assert_eq!(decide(idle(NOW - 10_000), vec![m.clone()], NOW).action, Action::Unload("tts".into()));
    assert_eq!(decide(DeviceView::Empty, vec![m], NOW).action, Action::Load("tts".into()));
}

#[test]
fn a_displaced_model_is_not_due_again_before_it_has_been_away() {
    let mut m = callers(model("llama"), 1, NOW - 100_000);
    m.left_at = Some(NOW - 30_000);
    assert_eq!(m.due(&Knobs::default()), Some(NOW - 30_000 + 180_000));
}

/// Plays a closed little world by the plan alone: jobs arrive, one at a time is served, loads take their time. Returns the
/// longest time any model waited with pending jobs, the swaps, and whether the device was ever idle beside loadable work.
fn play(arrivals: &[(Millis, usize, bool)], models: usize, load_ms: i64, job_ms: i64) -> (Millis, usize) {
    let knobs = Knobs::default();
    let mut views: Vec<ModelView> = (0..models)
        .map(|i| {
            let mut m = model(&format!("m{i}"));
            (m.load_ms, m.service_ms, m.each_ms) = (load_ms as f64, job_ms as f64, job_ms as f64);
            m
        })
        .collect();
    let mut queues: Vec<Vec<(Millis, bool)>> = vec![Vec::new(); models];
    let mut waiting_since: Vec<Option<Millis>> = vec![None; models];
    let (mut now, mut next, mut device, mut holder) = (0, 0, DeviceView::Empty, None::<usize>);
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
        let decided = plan(&View { device: device.clone(), models: views.clone() }, &knobs, now);
        match decided.action {
            Action::Load(name) | Action::Swap { to: name, .. } => {
                swaps += 1;
                if let Some(old) = holder {
                    views[old].left_at = Some(now);
                    if !queues[old].is_empty() {
                        waiting_since[old] = Some(now);
                    }
                }
                let index: usize = name[1..].parse().expect("index");
                now += load_ms;
                device = serving(&name, now);
                holder = Some(index);
                if let Some(since) = waiting_since[index].take() {
                    longest = longest.max(now - since);
                }
            }
            Action::Unload(_) => unreachable!("no ttl"),
            Action::Stay => match holder.filter(|h| !queues[*h].is_empty()) {
                Some(h) => {
                    let first = queues[h].iter().position(|(_, interactive)| *interactive).unwrap_or(0);
                    queues[h].remove(first);
                    now += job_ms;
                }
                None => {
                    assert!(queues.iter().all(Vec::is_empty), "idle beside work: {}", decided.decision.reason);
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
        prop_assert!(m.due(&Knobs::default()).expect("pending") >= left);
    }
}

#[test]
fn alternating_arrivals_are_grouped() {
    let arrivals: Vec<_> = (0..60).map(|i| (i * 16, usize::try_from(i % 3).expect("small"), false)).collect();
    let (_, swaps) = play(&arrivals, 3, 2_000, 50);
    assert!(swaps <= 4, "{swaps} loads for 60 jobs of 3 models");
}
