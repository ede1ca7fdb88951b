//! How a seed sets the world up.

use super::*;

fn setup(rng: &mut Rng) -> Setup {
    let count = rng.index(5) + 1;
    let (mut specs, mut load_ms, mut service_ms) = (Vec::new(), Vec::new(), Vec::new());
    for index in 0..count {
        let batches = rng.chance(500);
        let limit = rng.pick(&[1, 2, 3, 4, 8, 16, 32]);
        let max_batch = if batches { rng.pick(&[2, 4, 8, 32]) } else { 1 };
        load_ms.push(rng.pick(&[200, 2_000, 8_000]));
        service_ms.push(rng.pick(&[20, 300, 2_000]));
        specs.push(ModelSpec {
            name: format!("m{index}"),
            kind: if batches { ModelKind::Image } else { ModelKind::Text },
            launch: Launch::Command(vec!["x".to_owned()]),
            model: None,
            revision: None,
            port: 8001,
            has_own_port: false,
            startup_time: Duration::from_millis(rng.pick(&[500, 5_000, 60_000])),
            endpoints: vec!["/x".to_owned()],
            args: Vec::new(),
            env: BTreeMap::new(),
            aliases: Vec::new(),
            limit,
            max_batch,
            first_batch: max_batch,
            timeout: Duration::from_millis(rng.pick(&[5_000, 20_000, 60_000])),
            max_attempts: 3,
            idle_ttl: rng.chance(200).then(|| Duration::from_secs(5)),
            preload: rng.chance(100),
            gpus: 0,
            memory: None,
            max_replicas: 1,
            pin: false,
            exclusive: false,
            park: crate::domain::Park::Off,
            spare: false,
            upstream_model: String::new(),
            dir: "/".into(),
        });
    }
    let knobs = Knobs {
        park_ram: crate::policy::knobs::ParkRam::Bytes(0),
        max_wait_interactive: Duration::from_secs(rng.pick(&[2, 20, 60])),
        max_wait_batch: Duration::from_secs(rng.pick(&[10, 120, 900])),
        max_visit: Duration::from_secs(rng.pick(&[10, 300])),
        swap_budget_interactive: rng.pick(&[0.2, 0.5, 0.9]),
        swap_budget_other: rng.pick(&[0.15, 0.5]),
        queued_max: rng.pick(&[20, 1_000, 1_000]),
        queued_per_tenant_max: rng.pick(&[8, 1_000, 1_000]),
        waiting_sync_max: 1_000,
    };
    let jobs = rng.pick(&[1_usize, 8, 30, 60, 90]);
    let (favour, faults_until) = (rng.pick(&[0, 500, 900]), rng.range(10_000, 240_000));
    let (wild, killers, troubles) = (rng.chance(300), rng.pick(&[0, 30, 150]), rng.pick(&[0, 100, 300]));
    Setup { specs, knobs, load_ms, service_ms, wild, killers, troubles, jobs, favour, faults_until }
}

impl Sim {
    pub(super) fn new(seed: u64, trace: bool) -> Self {
        let mut rng = Rng(seed.wrapping_mul(0x2545_f491_4f6c_dd1d));
        let setup = setup(&mut rng);
        let workers = (0..setup.specs.len())
            .map(|_| Worker {
                phase: Phase::Absent,
                epoch: 0,
                port: 8001,
                orders: VecDeque::new(),
                loading_since: 0,
                failed_loads: 0,
                early_deaths: 0,
                runs: BTreeMap::new(),
            })
            .collect();
        let mut sim = Self {
            rng,
            trace,
            setup,
            now: 0,
            offset: 1_790_000_000_000,
            shown: 0,
            lost_time: 0,
            idle_wakes: 0,
            agenda: BTreeMap::new(),
            next_event: 0,
            generation: 0,
            server: None,
            workers,
            disk: Rows::default(),
            refusing: false,
            slow_disk: false,
            faults: true,
            natures: BTreeMap::new(),
            submitted: 0,
            next_task: 0,
            deaths: BTreeMap::new(),
            kept: BTreeMap::new(),
            acquitted: BTreeMap::new(),
            suspects: BTreeMap::new(),
            old: Vec::new(),
            terminal: BTreeMap::new(),
            due: None,
            seen: Seen::default(),
        };
        if sim.rng.chance(100) {
            let blocked = sim.rng.index(sim.workers.len());
            sim.workers[blocked].phase = Phase::Blocked;
            let back = sim.rng.range(1_000, 60_000);
            sim.world(back, Ev::GpuBack(blocked));
        }
        sim.boot();
        sim.world(1, Ev::Arrive);
        if sim.setup.troubles > 0 {
            sim.world(500, Ev::Strike);
        }
        sim.world(700, Ev::Cancels);
        sim.world(900, Ev::Stale);
        if sim.rng.chance(500) {
            sim.world(1_100, Ev::Operates);
        }
        let until = sim.setup.faults_until;
        sim.world(until, Ev::Cease);
        sim
    }
}
