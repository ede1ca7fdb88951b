//! What one decision costs: an event and the step after it, on a box of 8 GPUs with 10 models, while many jobs wait.
//!
//! `cargo bench --bench decide` prints p50, p99 and the most, in microseconds, for 50 000 and 1 000 000 waiting jobs,
//! and whether that is little enough. It fails if not.

#![expect(clippy::print_stdout, clippy::disallowed_methods, reason = "a benchmark measures, and prints its figures")]

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use roundhouse::domain::worker::Report;
use roundhouse::domain::{Face, Launch, Millis, ModelKind, ModelSpec};
use roundhouse::policy::Knobs;
use roundhouse::scheduler::state::{Effect, Event, Inventory, State};
use roundhouse::store::QueuedJob;
use roundhouse::worker::supervisor::Order;

const GB: u64 = 1_000_000_000;
const MODELS: usize = 10;
const TENANTS: i64 = 20;
const EVENTS: i64 = 20_000;
/// Target for the 99th percentile with 50 000 waiting jobs, in microseconds.
const P99_US: f64 = 1_000.0;
/// Target for that percentile with 1 000 000 waiting jobs, in parts of the one with 50 000.
const GROWTH: f64 = 1.5;

fn spec(index: usize) -> ModelSpec {
    ModelSpec {
        name: format!("m{index}"),
        kind: ModelKind::Custom,
        launch: Launch::Command(Vec::new()),
        model: None,
        revision: None,
        port: 0,
        has_own_port: false,
        startup_time: Duration::from_secs(30),
        endpoints: vec!["/".to_owned()],
        args: Vec::new(),
        env: BTreeMap::new(),
        aliases: Vec::new(),
        limit: [32, 4, 8][index % 3],
        max_batch: [1, 4, 8][index % 3],
        first_batch: [1, 4, 8][index % 3],
        timeout: Duration::from_secs(600),
        max_attempts: 1,
        idle_ttl: None,
        preload: false,
        gpus: [1, 1, 2, 4][index % 4],
        memory: Some([60, 38, 20][index % 3] * GB),
        max_replicas: 4,
        pin: false,
        exclusive: false,
        park: roundhouse::domain::Park::Ram,
        spare: false,
        upstream_model: String::new(),
        dir: "/".into(),
    }
}

fn job(number: i64, now: Millis, names: &[Arc<str>], tenants: &[Arc<str>]) -> QueuedJob {
    let pick = |of: &[Arc<str>], by: i64| of[usize::try_from(number * by).unwrap_or(0) % of.len()].clone();
    QueuedJob {
        number,
        model: pick(names, 7),
        tenant: pick(tenants, 13),
        face: Face::Async,
        priority: if number % 3 == 0 { 7 } else { 5 },
        batch_key: 0,
        created_at: now,
        was_started: false,
        crash: None,
        not_before: None,
        start_deadline: None,
        deadline: (number % 5 == 0).then_some(now + 100_000_000),
    }
}

/// Times of the decisions in microseconds, sorted.
fn times(waiting: i64) -> Vec<f64> {
    let specs: Vec<ModelSpec> = (0..MODELS).map(spec).collect();
    let names: Vec<Arc<str>> = specs.iter().map(|spec| Arc::from(spec.name.as_str())).collect();
    let tenants: Vec<Arc<str>> = (0..TENANTS).map(|n| Arc::from(format!("t{n}"))).collect();
    let inventory =
        Inventory { gpus: vec![80 * GB; 8], cpu: None, host: 400 * GB, one_at_a_time: false, gone: Default::default() };
    let mut state = State::new(&specs, Knobs::default(), &BTreeMap::new(), 1).on(inventory);
    let mut now: Millis = 1_000_000;
    (0..waiting).for_each(|number| state.enqueue(&job(number, now, &names, &tenants), now));
    let (mut running, mut reports) = (std::collections::VecDeque::new(), Vec::new());
    let (mut number, mut spent) = (waiting, Vec::new());
    let carry_out = |effects: Vec<Effect>, running: &mut std::collections::VecDeque<_>, reports: &mut Vec<_>| {
        for effect in effects {
            match effect {
                Effect::Claim { model, run, .. } => {
                    running.extend(run.jobs.iter().map(|job| (model.clone(), job.number)))
                }
                Effect::Order { model, replica, order: Order::Load | Order::Wake, .. } => {
                    let report = Report::Ready { base_url: String::new(), load_ms: 30_000 };
                    reports.push(Event::Report { model, replica, report });
                }
                Effect::Order { model, replica, order: Order::Stop, .. } => {
                    reports.push(Event::Report { model, replica, report: Report::Stopped { stop_ms: 1_000 } });
                }
                Effect::Order { model, replica, order: Order::Park, .. } => {
                    reports.push(Event::Report { model, replica, report: Report::Parked { park_ms: 1_000 } });
                }
                _ => {}
            }
        }
    };
    for round in 0..EVENTS {
        now += 37;
        let event = if round % 50 == 0 && !reports.is_empty() {
            reports.remove(0)
        } else if round % 2 == 0 {
            number += 1;
            Event::Queued(vec![job(number, now, &names, &tenants)])
        } else {
            match running.pop_front() {
                Some((model, number)) => Event::Ended { model, number, answered: true, suspect: false, back: None },
                None => Event::Queued(Vec::new()),
            }
        };
        let begun = Instant::now();
        let mut effects = state.on_event(event, now);
        effects.extend(state.step(now));
        spent.push(begun.elapsed().as_secs_f64() * 1e6);
        carry_out(effects, &mut running, &mut reports);
    }
    spent.sort_by(f64::total_cmp);
    spent
}

fn main() -> std::process::ExitCode {
    println!("{:>10} {:>10} {:>10} {:>10}   (us, {EVENTS} events)", "waiting", "p50", "p99", "most");
    let [usual, many] = [50_000, 1_000_000].map(|waiting| {
        let times = times(waiting);
        let at = |share: usize| times[(times.len() * share / 100).min(times.len() - 1)];
        println!("{waiting:>10} {:>10.1} {:>10.1} {:>10.1}", at(50), at(99), at(100));
        at(99)
    });
    println!("\n{:<36} {:>9} {:>9}", "measure", "target", "got");
    let mut missed = false;
    for (measure, target, got) in
        [("p99 at 50 000 waiting, us", P99_US, usual), ("p99 at 1 000 000 / at 50 000", GROWTH, many / usual)]
    {
        let ok = got <= target;
        missed |= !ok;
        println!("{measure:<36} {:>9} {got:>9.2}  {}", format!("<= {target}"), if ok { "ok" } else { "MISSED" });
    }
    if missed { std::process::ExitCode::FAILURE } else { std::process::ExitCode::SUCCESS }
}
