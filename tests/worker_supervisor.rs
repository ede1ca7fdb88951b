//! Supervisors with real processes: small Python servers under the real guard.

#![expect(clippy::unwrap_used, reason = "a test may panic in its helpers too")]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};
use std::thread::ThreadId;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use roundhouse::clock::SystemClock;
use roundhouse::domain::worker::Report;
use roundhouse::domain::{ErrorCode, GpuSet, Launch, ModelKind, ModelSpec, ModelState};
use roundhouse::lifecycle::Tasks;
use roundhouse::worker::gpu::{self, Gpu, GpuProbe};
use roundhouse::worker::supervisor::{Order, StuckMemory, Surroundings, Tempo, WorkerHandle, end_orphans};
use tokio::sync::mpsc;
use tokio::time::Instant;

/// A worker in the shape of ours, with faults by flag. It writes its process id, and those of its children, as empty
/// files `pid-N` into its working directory.
const TOY: &str = r#"
import argparse, http.server, json, os, signal, socket, subprocess, sys, threading, time

flags = argparse.ArgumentParser()
flags.add_argument("--name")
flags.add_argument("--port", type=int)
flags.add_argument("--load-s", type=float, default=0)
flags.add_argument("--exit", type=int)
flags.add_argument("--fail")
flags.add_argument("--stock", action="store_true")
flags.add_argument("--strange-on", type=int)
flags.add_argument("--ignore-term", action="store_true")
flags.add_argument("--escape", action="store_true")
flags.add_argument("--hang-file")
flags.add_argument("--stays-awake", action="store_true")
flags.add_argument("--wake-hangs", action="store_true")
flags.add_argument("--sleep-fails", action="store_true")
flags.add_argument("--hold-file")
flags.add_argument("--vllm", choices=("dev", "old"))
flags.add_argument("--host-bytes", type=int)
flags.add_argument("--memory-dir")
flags.add_argument("--memory-bytes", type=int, default=0)
flags.add_argument("--asleep-bytes", type=int, default=700000000)
flags.add_argument("--device-bytes", type=int)
args = flags.parse_args()
started = time.monotonic()

if args.exit is not None:
    print("loading weights", flush=True)
    print("ValueError: there are no weights", file=sys.stderr, flush=True)
    sys.exit(args.exit)
if args.ignore_term:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
open(f"pid-{os.getpid()}", "w").close()
if args.escape:
    code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
    for options in ({"start_new_session": True}, {"process_group": 0}):
        child = subprocess.Popen([sys.executable, "-c", code], **options)
        open(f"pid-{child.pid}", "w").close()
if args.memory_dir:
    with open(os.path.join(args.memory_dir, str(os.getpid())), "w") as file:
        file.write(str(args.memory_bytes))

sleeping = False

class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_GET(self):
        while args.hang_file and os.path.exists(args.hang_file):
            time.sleep(0.05)
        if args.stock:
            self.answer(200 if self.path == "/v1/models" else 404, {})
            return
        if self.path == "/is_sleeping":
            self.answer(200, {"is_sleeping": sleeping})
            return
        if args.vllm:
            # FastAPI, asked in another way than a route allows.
            is_there = self.path == "/collective_rpc" and args.vllm == "dev"
            self.answer(200 if self.path == "/health" else 405 if is_there else 404, None)
            return
        done = min(1, (time.monotonic() - started) / args.load_s) if args.load_s else 1
        status = "asleep" if sleeping else "failed" if args.fail else "ready" if done == 1 else "loading"
        instance = "another" if args.strange_on == args.port else os.environ.get("ROUNDHOUSE_INSTANCE")
        body = {"status": status, "phase": "weights", "percent": int(done * 4) * 25, "instance": instance}
        if args.device_bytes is not None:
            body["device_bytes"] = args.device_bytes
        if args.host_bytes is not None:
            body["host_bytes"] = args.host_bytes
        self.answer(200 if status == "ready" else 503, body | ({"error": args.fail} if args.fail else {}))

    def do_POST(self):
        global sleeping
        while args.wake_hangs and self.path == "/wake_up":
            time.sleep(0.05)
        with open("calls", "a") as file:
            body = self.rfile.read(int(self.headers.get("content-length") or 0)).decode()
            file.write(f"{self.path} {body}".rstrip() + "\n")
        while args.hold_file and os.path.exists(args.hold_file):
            time.sleep(0.05)
        if args.sleep_fails and self.path.startswith("/sleep"):
            self.answer(500, {})
            return
        if not args.stays_awake:
            sleeping = self.path.startswith("/sleep")
        if args.memory_dir and not args.stays_awake:
            with open(os.path.join(args.memory_dir, str(os.getpid())), "w") as file:
                file.write(str(args.asleep_bytes if sleeping else args.memory_bytes))
        self.answer(200, {})

    def answer(self, status, body):
        data = b"" if body is None else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

try:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", args.port), Handler)
except OSError as error:
    # As asyncio does, it names the port.
    sys.exit(f"OSError: error while attempting to bind on address ('127.0.0.1', {args.port}): {error}")
server.serve_forever()
"#;

const GRACE: Duration = Duration::from_millis(700);

/// A data dir, a script, and what supervisors share.
struct Bench {
    dir: tempfile::TempDir,
    around: Surroundings,
    tempo: Tempo,
}

/// One supervised worker and its reports.
struct Worker {
    handle: WorkerHandle,
    reports: mpsc::UnboundedReceiver<(String, u32, Report)>,
}

impl Bench {
    fn new() -> Self {
        Self::with_gpus(None)
    }

    fn with_gpus(setting: Option<&str>) -> Self {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("toy.py"), TOY).unwrap();
        let gpus: Arc<dyn GpuProbe> = gpu::from_setting(setting.or(Some("none"))).unwrap();
        let unique = dir.path().file_name().unwrap().to_string_lossy();
        Self {
            around: Surroundings {
                clock: Arc::new(SystemClock::default()),
                gpus,
                tasks: Tasks::new(),
                data_dir_id: format!("test{unique}"),
                log_dir: dir.path().join("logs"),
                program: PathBuf::from(env!("CARGO_BIN_EXE_roundhouse")),
                grace: GRACE,
                stuck: StuckMemory::default(),
                backoff_first: Duration::from_millis(20),
                backoff_max: Duration::from_millis(100),
                spares: roundhouse::worker::spare::Spares::default(),
            },
            tempo: Tempo {
                watch_every: Duration::from_millis(100),
                watch_limit: Duration::from_millis(300),
                suspect_limit: Duration::from_millis(300),
                stranger_limit: Duration::from_millis(100),
                gpu_every: Duration::from_millis(50),
                ..Tempo::default()
            },
            dir,
        }
    }

    fn path(&self) -> &Path {
        self.dir.path()
    }

    fn spec(&self, flags: &[&str]) -> ModelSpec {
        ModelSpec {
            name: "toy".into(),
            kind: ModelKind::Custom,
            launch: Launch::Script { python: "python3".into(), script: self.path().join("toy.py") },
            model: None,
            revision: None,
            port: 8101,
            has_own_port: false,
            startup_time: Duration::from_secs(1),
            endpoints: vec!["/echo".into()],
            args: flags.iter().map(|f| (*f).to_owned()).collect(),
            env: BTreeMap::new(),
            aliases: Vec::new(),
            limit: 1,
            max_batch: 1,
            first_batch: 1,
            timeout: Duration::from_secs(60),
            max_attempts: 3,
            idle_ttl: None,
            preload: false,
            gpus: 0,
            memory: None,
            max_replicas: 1,
            pin: false,
            exclusive: false,
            park: roundhouse::domain::Park::Off,
            spare: false,
            upstream_model: "toy".into(),
            dir: self.path().to_owned(),
        }
    }

    fn supervise(&self, spec: ModelSpec) -> Worker {
        let (sender, reports) = mpsc::unbounded_channel();
        let handle = WorkerHandle::start_with(spec, 0, self.around.clone(), self.tempo.clone(), sender);
        Worker { handle, reports }
    }

    fn worker(&self, flags: &[&str]) -> Worker {
        self.supervise(self.spec(flags))
    }

    /// What workers were told by POST since the last call: path and body of each.
    fn calls(&self) -> Vec<String> {
        let calls = std::fs::read_to_string(self.path().join("calls")).unwrap_or_default();
        let _ = std::fs::remove_file(self.path().join("calls"));
        calls.lines().map(str::to_owned).collect()
    }

    /// Processes with this data dir's mark.
    fn marked(&self) -> Vec<i32> {
        let mark = format!("ROUNDHOUSE_INSTANCE={}:", self.around.data_dir_id);
        let pids = std::fs::read_dir("/proc").unwrap().flatten();
        pids.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok())
            .filter(|pid| {
                let environ = std::fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
                environ.windows(mark.len()).any(|w| w == mark.as_bytes()) && is_alive(*pid)
            })
            .collect()
    }

    /// The processes that wrote a `pid-N` file, alive or not.
    fn toys(&self) -> Vec<i32> {
        let entries = std::fs::read_dir(self.path()).unwrap().flatten();
        entries.filter_map(|e| e.file_name().to_str()?.strip_prefix("pid-")?.parse().ok()).collect()
    }

    fn assert_nothing_left(&self) {
        assert_eq!(self.marked(), Vec::<i32>::new(), "marked processes");
        let alive: Vec<i32> = self.toys().into_iter().filter(|p| is_alive(*p)).collect();
        assert_eq!(alive, Vec::<i32>::new(), "toys");
    }
}

impl Worker {
    async fn next(&mut self) -> Report {
        let next = tokio::time::timeout(Duration::from_secs(30), self.reports.recv());
        let (model, replica, report) = next.await.expect("a report in time").expect("a supervisor");
        assert_eq!((model.as_str(), replica), ("toy", 0));
        report
    }

    /// The next report that is not about loading progress.
    async fn settled(&mut self) -> Report {
        loop {
            match self.next().await {
                Report::Loading { .. } | Report::Loaded { .. } | Report::Keeps { .. } => {}
                other => return other,
            }
        }
    }

    async fn load(&mut self) -> String {
        self.handle.order(Order::Load);
        match self.settled().await {
            Report::Ready { base_url, .. } => base_url,
            other => panic!("not ready: {other:?}"),
        }
    }

    async fn stop(&mut self) {
        self.handle.order(Order::Stop);
        let report = self.settled().await;
        assert!(matches!(report, Report::Stopped { .. }), "{report:?}");
    }

    async fn park(&mut self) {
        self.handle.order(Order::Park);
        let report = self.settled().await;
        assert!(matches!(report, Report::Parked { .. }), "{report:?}");
        assert_eq!(self.handle.view().state, ModelState::Parked);
    }

    async fn death(&mut self) -> String {
        match self.settled().await {
            Report::Died { reason } => reason,
            other => panic!("not dead: {other:?}"),
        }
    }
}

/// Not gone and not a zombie.
fn is_alive(pid: i32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let state = stat.rsplit(')').next().and_then(|s| s.split_whitespace().next());
    state.is_some_and(|s| s != "Z" && s != "X")
}

async fn until(what: &str, mut done: impl FnMut() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < Duration::from_secs(20), "never: {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

#[tokio::test]
async fn loads_tells_its_progress_and_stops() {
    let bench = Bench::new();
    let mut worker = bench.worker(&["--load-s", "0.4"]);
    assert_eq!(worker.handle.view().state, ModelState::Absent);
    worker.handle.order(Order::Load);
    let mut percents = Vec::new();
    let base_url = loop {
        match worker.next().await {
            Report::Loading { percent, phase } => percents.push((phase, percent)),
            Report::Loaded { phases } => {
                let names: Vec<&str> = phases.iter().map(|phase| phase.phase.as_str()).collect();
                assert_eq!(names, ["spawn", "load"], "it tells no phases itself");
                assert!(phases.iter().map(|phase| phase.ms).sum::<i64>() >= 398, "{phases:?}");
            }
            Report::Ready { base_url, load_ms } => {
                assert!(load_ms >= 400, "{load_ms}");
                break base_url;
            }
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(percents[0], (None, None));
    let mut once = percents.clone();
    once.dedup();
    assert_eq!(once, percents, "only changes are told");
    assert!(percents.len() >= 3, "{percents:?}");
    let view = worker.handle.view();
    assert_eq!((view.state, view.starts), (ModelState::Resident, 1));
    assert_eq!(format!("http://127.0.0.1:{}", view.port.unwrap()), base_url);
    assert!(is_alive(view.pid.unwrap().cast_signed()));

    worker.handle.order(Order::Load); // Nothing to do.
    worker.stop().await;
    bench.assert_nothing_left();
    assert_eq!(worker.handle.view().state, ModelState::Absent);
    worker.stop().await; // Absent already: at once.
    worker.load().await;
    assert_eq!(worker.handle.view().starts, 2);
}

#[tokio::test]
async fn a_stock_server_is_ready_when_it_lists_models() {
    let bench = Bench::new();
    let mut worker = bench.worker(&["--stock"]);
    worker.load().await;
    tokio::time::sleep(bench.tempo.watch_every * 5).await;
    assert_eq!(worker.handle.view().state, ModelState::Resident);
    worker.stop().await;
}

#[tokio::test]
async fn a_stranger_on_the_port_is_never_taken_for_the_worker() {
    let bench = Bench::new();
    let mut spec = bench.spec(&[]);
    spec.port = 8155;
    spec.args = vec!["--strange-on".into(), "8155".into()];
    let mut worker = bench.supervise(spec);
    let base_url = worker.load().await;
    assert_ne!(base_url, "http://127.0.0.1:8155");
    assert_eq!(worker.handle.view().starts, 2);
    worker.stop().await;
    bench.assert_nothing_left();
}

#[tokio::test]
async fn failed_loads_back_off_and_are_quarantined() {
    let bench = Bench::new();
    let mut worker = bench.worker(&["--exit", "3"]);
    let mut waits = Vec::new();
    for at in 1..=5 {
        worker.handle.order(Order::Load);
        let Report::LoadFailed { error, retry_at, quarantined } = worker.settled().await else {
            panic!("loaded");
        };
        assert_eq!(error.code, ErrorCode::ModelLoadFailed);
        for text in ["`toy`", "exited with status 3", "ValueError: there are no weights"] {
            assert!(error.message.contains(text), "{}", error.message);
        }
        let details = error.details.unwrap();
        assert_eq!(details["log_tail"][0], "loading weights");
        assert_eq!(details["failed_loads"], at);
        assert_eq!(quarantined, at == 5);
        let view = worker.handle.view();
        waits.push(retry_at - view.since);
        assert_eq!(view.retry_at, Some(retry_at));
        assert_eq!(view.failed_loads, at);
        assert_eq!(view.state, if at == 5 { ModelState::Quarantined } else { ModelState::Backoff });
        assert_eq!(worker.next().await, Report::Available);
    }
    for (wait, expected) in waits.iter().zip([20, 40, 80, 100, 100]) {
        assert!((expected - 5..=expected + 5).contains(wait), "{waits:?}");
    }
    bench.assert_nothing_left();
    let log = std::fs::read_to_string(bench.path().join("logs/toy.log")).unwrap();
    assert_eq!(log.matches("ValueError").count(), 5);
}

#[tokio::test]
async fn a_retry_forgets_the_back_off() {
    let mut bench = Bench::new();
    bench.around.backoff_first = Duration::from_secs(600);
    bench.around.backoff_max = Duration::from_secs(600);
    let mut worker = bench.worker(&["--exit", "3"]);
    worker.handle.order(Order::Load);
    let first = worker.settled().await;
    let Report::LoadFailed { error, retry_at, quarantined } = first else { panic!("loaded: {first:?}") };
    worker.handle.order(Order::Load); // Too early: the same answer.
    assert_eq!(worker.settled().await, Report::BacksOff { error, retry_at, quarantined, deaths: 0 });
    worker.handle.order(Order::Retry);
    assert_eq!(worker.settled().await, Report::Available);
    assert_eq!(worker.handle.view().failed_loads, 0);
    assert_eq!(worker.handle.view().reason, None);
}

#[tokio::test]
async fn a_worker_that_says_it_failed_has_failed() {
    let bench = Bench::new();
    let mut worker = bench.worker(&["--fail", "not enough memory"]);
    worker.handle.order(Order::Load);
    let Report::LoadFailed { error, .. } = worker.settled().await else {
        panic!("loaded");
    };
    assert!(error.message.contains("not enough memory"), "{}", error.message);
    bench.assert_nothing_left();
}

#[tokio::test]
async fn a_load_that_takes_too_long_is_ended() {
    let mut bench = Bench::new();
    bench.tempo.load_limit_min = Duration::from_millis(500);
    let mut spec = bench.spec(&["--load-s", "600"]);
    spec.startup_time = Duration::from_millis(1);
    let mut worker = bench.supervise(spec);
    worker.handle.order(Order::Load);
    let Report::LoadFailed { error, .. } = worker.settled().await else {
        panic!("loaded");
    };
    assert!(error.message.contains("not ready within 0.5 s"), "{}", error.message);
    bench.assert_nothing_left();
}

#[tokio::test]
async fn programs_that_are_not_there_are_named() {
    let bench = Bench::new();
    let mut spec = bench.spec(&[]);
    spec.launch = Launch::Command(vec!["no-such-engine".into(), "{port}".into()]);
    let mut worker = bench.supervise(spec);
    worker.handle.order(Order::Load);
    let Report::LoadFailed { error, .. } = worker.settled().await else {
        panic!("loaded");
    };
    assert!(error.message.contains("cannot start `no-such-engine`"), "{}", error.message);

    let mut spec = bench.spec(&[]);
    let python = bench.path().join(".venv/bin/python");
    spec.launch = Launch::Script { python: python.clone(), script: bench.path().join("toy.py") };
    let mut worker = bench.supervise(spec);
    worker.handle.order(Order::Load);
    let Report::LoadFailed { error, .. } = worker.settled().await else {
        panic!("loaded");
    };
    assert!(error.message.contains(&python.display().to_string()));
    assert!(error.message.contains("roundhouse models install toy"), "{}", error.message);
}

#[tokio::test]
async fn a_stop_breaks_a_load_off_and_a_load_after_it_is_followed() {
    let bench = Bench::new();
    let mut worker = bench.worker(&["--load-s", "600"]);
    worker.handle.order(Order::Load);
    until("the toy runs", || !bench.toys().is_empty()).await;
    worker.stop().await;
    bench.assert_nothing_left();

    let mut worker = bench.worker(&["--ignore-term"]);
    worker.load().await;
    worker.handle.order(Order::Stop);
    worker.handle.order(Order::Load); // While it stops.
    assert!(matches!(worker.settled().await, Report::Stopped { .. }));
    assert!(matches!(worker.settled().await, Report::Ready { .. }));
    assert_eq!(worker.handle.view().starts, 2);
}

#[tokio::test]
async fn a_killed_worker_is_reported_dead_and_nothing_of_it_is_left() {
    let bench = Bench::new();
    let mut worker = bench.worker(&["--escape"]);
    worker.load().await;
    let view = worker.handle.view();
    let guard = view.pid.unwrap().cast_signed();
    assert_eq!(bench.marked().len(), 4, "guard, worker and two children");
    let group = |pid: i32| nix::unistd::getpgid(Some(Pid::from_raw(pid))).unwrap();
    // The worker is the one whose parent is the guard.
    let parent = |pid: i32| {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
        let rest = stat.rsplit(')').next().unwrap().to_owned();
        rest.split_whitespace().nth(1).unwrap().parse::<i32>().unwrap()
    };
    let toy = bench.toys().into_iter().find(|pid| parent(*pid) == guard).expect("the worker");
    assert_eq!(group(toy).as_raw(), toy, "its own group");
    kill(Pid::from_raw(toy), Signal::SIGKILL).unwrap();
    let reason = worker.death().await;
    assert!(reason.contains("killed by SIGKILL"), "{reason}");
    bench.assert_nothing_left();
    assert_eq!(worker.handle.view().state, ModelState::Absent);
    worker.load().await;
}

#[tokio::test]
async fn a_killed_guard_is_noticed_and_its_worker_swept() {
    let bench = Bench::new();
    let mut worker = bench.worker(&["--ignore-term", "--escape"]);
    worker.load().await;
    let guard = worker.handle.view().pid.unwrap().cast_signed();
    kill(Pid::from_raw(guard), Signal::SIGKILL).unwrap();
    let reason = worker.death().await;
    assert!(reason.contains("lost its guard"), "{reason}");
    bench.assert_nothing_left();
}

#[tokio::test]
async fn a_stubborn_worker_is_gone_within_grace_and_two_seconds() {
    let bench = Bench::new();
    let mut worker = bench.worker(&["--ignore-term", "--escape"]);
    worker.load().await;
    let start = Instant::now();
    worker.stop().await;
    let took = start.elapsed();
    bench.assert_nothing_left();
    assert!(took >= GRACE, "it had its grace: {took:?}");
    assert!(took < GRACE + Duration::from_secs(2), "{took:?}");
}

#[tokio::test]
async fn escaped_children_do_not_cost_the_grace_period() {
    let mut bench = Bench::new();
    bench.around.grace = Duration::from_secs(60);
    let mut worker = bench.worker(&["--escape"]);
    worker.load().await;
    let start = Instant::now();
    worker.stop().await;
    assert!(start.elapsed() < Duration::from_secs(10));
    bench.assert_nothing_left();
}

#[tokio::test]
async fn signals_do_not_end_the_guard() {
    let bench = Bench::new();
    let mut worker = bench.worker(&[]);
    worker.load().await;
    let guard = worker.handle.view().pid.unwrap().cast_signed();
    for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP] {
        kill(Pid::from_raw(guard), signal).unwrap();
    }
    tokio::time::sleep(bench.tempo.watch_every * 3).await;
    assert!(is_alive(guard));
    assert_eq!(worker.handle.view().state, ModelState::Resident);
    worker.stop().await;
}

#[tokio::test]
async fn deaths_soon_after_readiness_back_off_in_the_end() {
    let bench = Bench::new();
    let mut worker = bench.worker(&[]);
    for at in 1..=3 {
        worker.load().await;
        for pid in bench.toys() {
            kill(Pid::from_raw(pid), Signal::SIGKILL).ok();
        }
        if at == 3 {
            // Before the death, so that nobody orders a load in between.
            let Report::BacksOff { error, quarantined, deaths, .. } = worker.settled().await else {
                panic!("no back-off");
            };
            assert!(
                error.message.starts_with("model `toy` is not loaded for now: its worker died 3 times in a row"),
                "{}",
                error.message
            );
            let details = error.details.unwrap();
            assert_eq!((&details["deaths"], details.get("failed_loads")), (&serde_json::json!(3), None));
            assert_eq!((quarantined, deaths), (false, 3));
            let told = worker.handle.view().last_failure.unwrap();
            assert!(told.starts_with("its worker died 3 times"), "no load has failed: {told}");
        }
        worker.death().await;
        if at == 3 {
            assert_eq!(worker.settled().await, Report::Available);
        }
        for pid in bench.toys() {
            std::fs::remove_file(bench.path().join(format!("pid-{pid}"))).unwrap();
        }
    }
}

#[tokio::test]
async fn deaths_with_an_answer_in_between_are_not_in_a_row() {
    let bench = Bench::new();
    let mut worker = bench.worker(&[]);
    for _ in 0..4 {
        worker.load().await;
        worker.handle.order(Order::Proven);
        for pid in bench.toys() {
            kill(Pid::from_raw(pid), Signal::SIGKILL).ok();
            std::fs::remove_file(bench.path().join(format!("pid-{pid}"))).unwrap();
        }
        worker.death().await;
        assert_eq!(worker.handle.view().failed_loads, 0);
    }
}

#[tokio::test]
async fn a_worker_that_stops_answering_is_ended() {
    for suspect in [false, true] {
        let mut bench = Bench::new();
        if suspect {
            bench.tempo.watch_every = Duration::from_secs(600);
        }
        let hang = bench.path().join("hang");
        let hang_file = hang.display().to_string();
        let mut worker = bench.worker(&["--hang-file", &hang_file]);
        worker.load().await;
        if suspect {
            worker.handle.order(Order::Suspect);
            let report = worker.settled().await;
            assert!(matches!(report, Report::Ready { load_ms: 0, .. }), "it answers: {report:?}");
            assert_eq!(worker.handle.view().state, ModelState::Resident);
        }
        std::fs::write(&hang, "").unwrap();
        if suspect {
            worker.handle.order(Order::Suspect);
        }
        let reason = worker.death().await;
        assert!(reason.contains("no answer within 0.3 s"), "{reason}");
        bench.assert_nothing_left();
    }
}

#[tokio::test]
async fn a_gpu_model_waits_for_a_gpu() {
    let gpus = tempfile::tempdir().unwrap();
    let setting = format!("dir:{}", gpus.path().display());
    let bench = Bench::with_gpus(Some(&setting));
    let mut spec = bench.spec(&[]);
    spec.gpus = 1;
    let mut worker = bench.supervise(spec);
    assert_eq!(worker.next().await, Report::NoGpu, "known from the start, without an order");
    let view = worker.handle.view();
    assert_eq!(view.state, ModelState::Blocked);
    assert!(view.reason.unwrap().contains("GPU"));
    worker.handle.order(Order::Load);
    assert_eq!(worker.next().await, Report::NoGpu);

    let card = r#"[{"index":0,"name":"Fake","total_bytes":8000000000}]"#;
    std::fs::write(gpus.path().join("gpus.json.new"), card).unwrap();
    std::fs::rename(gpus.path().join("gpus.json.new"), gpus.path().join("gpus.json")).unwrap();
    assert_eq!(worker.next().await, Report::Available);
    assert_eq!(worker.handle.view().state, ModelState::Absent);
    worker.load().await;
    worker.stop().await;
}

/// A driver without cards that remembers on which threads it was asked.
#[derive(Default)]
struct Asked(Mutex<Vec<ThreadId>>);

impl GpuProbe for Asked {
    fn gpus(&self) -> Vec<Gpu> {
        self.0.lock().unwrap().push(std::thread::current().id());
        Vec::new()
    }
}

#[tokio::test]
async fn the_driver_is_asked_beside_the_runtime_and_its_first_answer_can_be_waited_for() {
    let mut bench = Bench::new();
    let driver = Arc::new(Asked::default());
    bench.around.gpus = driver.clone();
    let mut spec = bench.spec(&[]);
    spec.gpus = 1;
    let worker = bench.supervise(spec);
    worker.handle.has_looked().await;
    assert_eq!(worker.handle.view().state, ModelState::Blocked);
    let threads = driver.0.lock().unwrap();
    // The whole runtime of this test is on this thread.
    assert!(!threads.is_empty() && !threads.contains(&std::thread::current().id()));
}

#[tokio::test]
async fn a_stop_is_over_when_the_driver_shows_the_memory_free() {
    let gpus = tempfile::tempdir().unwrap();
    let card = r#"[{"index":0,"name":"Fake","total_bytes":80000000000}]"#;
    std::fs::write(gpus.path().join("gpus.json"), card).unwrap();
    let setting = format!("dir:{}", gpus.path().display());
    let bench = Bench::with_gpus(Some(&setting));
    let memory_dir = gpus.path().display().to_string();
    let mut spec = bench.spec(&["--memory-dir", &memory_dir, "--memory-bytes", "5000000000"]);
    spec.gpus = 1;
    let mut worker = bench.supervise(spec);
    worker.load().await;
    let toy = bench.toys()[0];
    worker.handle.order(Order::Stop);
    until("the toy is gone", || !is_alive(toy)).await;
    // As with a real driver, the memory is freed some time later.
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert!(worker.reports.try_recv().is_err(), "memory is still in use");
    std::fs::remove_file(gpus.path().join(toy.to_string())).unwrap();
    assert!(matches!(worker.settled().await, Report::Stopped { stop_ms } if stop_ms >= 500));
}

#[tokio::test]
async fn a_parked_worker_wakes_where_it_was_and_can_be_stopped() {
    let bench = Bench::new();
    let mut worker = bench.worker(&[]);
    let base_url = worker.load().await;
    for order in [Order::Wake, Order::Load] {
        worker.park().await;
        let view = worker.handle.view();
        assert!(view.pid.is_some() && view.port.is_some(), "{view:?}");
        worker.handle.order(order);
        let report = worker.next().await;
        assert!(matches!(&report, Report::Ready { base_url: url, .. } if *url == base_url), "no load: {report:?}");
        assert_eq!((worker.handle.view().state, worker.handle.view().starts), (ModelState::Resident, 1));
    }
    worker.park().await;
    worker.stop().await;
    assert_eq!(worker.handle.view().state, ModelState::Absent);
    bench.assert_nothing_left();
}

#[tokio::test]
async fn a_worker_that_stays_awake_or_does_not_know_how_to_sleep_is_stopped_instead() {
    let bench = Bench::new();
    for flag in ["--stays-awake", "--stock"] {
        let mut worker = bench.worker(&[flag]);
        worker.load().await;
        worker.handle.order(Order::Park);
        let report = worker.settled().await;
        assert!(matches!(report, Report::Stopped { .. }), "{flag}: {report:?}");
        bench.assert_nothing_left();
    }
}

#[tokio::test]
async fn a_worker_that_does_not_wake_is_killed_and_loaded_anew_within_the_same_order() {
    let mut bench = Bench::new();
    bench.tempo.wake_limit = Duration::from_millis(300);
    let mut worker = bench.worker(&["--wake-hangs"]);
    worker.load().await;
    let first = bench.toys();
    worker.park().await;
    worker.handle.order(Order::Wake);
    let report = worker.next().await;
    assert!(matches!(report, Report::Loading { .. }), "it says that it loads: {report:?}");
    assert!(matches!(worker.settled().await, Report::Ready { .. }));
    assert_eq!(worker.handle.view().starts, 2);
    assert!(!is_alive(first[0]), "the first is gone");
}

#[tokio::test]
async fn a_parked_worker_that_dies_is_reported_and_its_next_load_waits_for_nothing() {
    let bench = Bench::new();
    let mut worker = bench.worker(&[]);
    for deaths in 1..=4 {
        worker.load().await;
        worker.park().await;
        let alive: Vec<i32> = bench.toys().into_iter().filter(|pid| is_alive(*pid)).collect();
        kill(Pid::from_raw(alive[0]), Signal::SIGKILL).unwrap();
        let reason = worker.death().await;
        assert!(reason.contains("while it was parked"), "{reason}");
        assert_eq!((worker.handle.view().state, worker.handle.view().starts), (ModelState::Absent, deaths));
    }
    bench.assert_nothing_left();
}

#[tokio::test]
async fn parked_means_that_the_driver_shows_the_memory_back() {
    let gpus = tempfile::tempdir().unwrap();
    let card = r#"[{"index":0,"name":"Fake","total_bytes":80000000000}]"#;
    std::fs::write(gpus.path().join("gpus.json"), card).unwrap();
    let mut bench = Bench::with_gpus(Some(&format!("dir:{}", gpus.path().display())));
    bench.tempo.park_memory_limit = Duration::from_millis(200);
    bench.tempo.memory_limit = Duration::from_millis(200);
    let memory_dir = gpus.path().display().to_string();
    let mut spec = bench.spec(&["--memory-dir", &memory_dir, "--memory-bytes", "5000000000"]);
    spec.gpus = 1;
    let mut worker = bench.supervise(spec.clone());
    worker.load().await;
    // It keeps 0.7 GB, as a process with a CUDA context does.
    worker.handle.order_on(Order::Park, GpuSet::one(0), None);
    assert_eq!(worker.next().await, Report::Keeps { device_bytes: 700_000_000 });
    assert!(matches!(worker.settled().await, Report::Parked { .. }));
    assert_eq!(worker.handle.view().device_bytes, Some(700_000_000));
    worker.handle.order(Order::Wake);
    assert!(matches!(worker.settled().await, Report::Ready { .. }));
    let toy = bench.toys().into_iter().find(|pid| is_alive(*pid)).unwrap();
    worker.stop().await;
    std::fs::remove_file(gpus.path().join(toy.to_string())).unwrap();
    // One that says that it sleeps and keeps everything.
    spec.args = ["--memory-dir", &memory_dir, "--memory-bytes", "700000000"].map(str::to_owned).to_vec();
    let mut worker = bench.supervise(spec);
    worker.load().await;
    worker.handle.order(Order::Park);
    let report = worker.settled().await;
    assert!(matches!(report, Report::Stopped { .. }), "{report:?}");
    bench.assert_nothing_left();
}

#[tokio::test]
async fn a_parked_worker_that_is_wanted_on_another_gpu_is_loaded_there_from_nothing() {
    let gpus = tempfile::tempdir().unwrap();
    let card = |index: u32| serde_json::json!({"index": index, "name": "Fake", "total_bytes": 80_000_000_000_u64});
    std::fs::write(gpus.path().join("gpus.json"), serde_json::json!([card(0), card(1)]).to_string()).unwrap();
    let bench = Bench::with_gpus(Some(&format!("dir:{}", gpus.path().display())));
    let mut worker = bench.supervise(ModelSpec { gpus: 1, ..bench.spec(&[]) });
    for (order, gpu, starts) in [(Order::Load, 0, 1), (Order::Wake, 0, 1), (Order::Wake, 1, 2)] {
        worker.handle.order_on(order, GpuSet::one(gpu), None);
        assert!(matches!(worker.settled().await, Report::Ready { .. }));
        let view = worker.handle.view();
        assert_eq!((view.gpus, view.starts), (vec![gpu], starts));
        worker.park().await;
    }
    worker.stop().await;
    bench.assert_nothing_left();
}

#[tokio::test]
async fn the_hard_stage_ends_a_parked_worker() {
    let bench = Bench::new();
    let mut worker = bench.worker(&[]);
    worker.load().await;
    worker.park().await;
    bench.around.tasks.hard().cancel();
    assert!(bench.around.tasks.wait(Duration::from_secs(20)).await);
    bench.assert_nothing_left();
}

#[tokio::test]
async fn the_hard_stage_ends_the_worker() {
    let bench = Bench::new();
    let mut worker = bench.worker(&["--escape"]);
    worker.load().await;
    bench.around.tasks.hard().cancel();
    assert!(bench.around.tasks.wait(Duration::from_secs(20)).await);
    bench.assert_nothing_left();
}

#[tokio::test]
async fn dropping_the_handle_ends_the_worker() {
    let bench = Bench::new();
    let mut worker = bench.worker(&[]);
    worker.load().await;
    drop(worker.handle);
    assert!(bench.around.tasks.wait(Duration::from_secs(20)).await);
    bench.assert_nothing_left();
}

/// Starts the guard as the server does, with the lifeline held by another process.
fn guard_on_a_leash(bench: &Bench, flags: &[&str]) -> (std::process::Child, std::process::Child) {
    let (reader, writer) = std::io::pipe().unwrap();
    let holder = Command::new("sleep").arg("600").stdout(writer).spawn().unwrap();
    let guard = Command::new(&bench.around.program)
        .args(["guard", "--grace-ms", "500", "--", "python3", "toy.py", "--port", "8199"])
        .args(flags)
        .env("ROUNDHOUSE_INSTANCE", format!("{}:leash", bench.around.data_dir_id))
        .current_dir(bench.path())
        .stdin(reader)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    (holder, guard)
}

#[tokio::test]
async fn when_the_server_is_killed_the_guard_ends_its_worker() {
    let bench = Bench::new();
    let (mut server, mut guard) = guard_on_a_leash(&bench, &["--ignore-term", "--escape"]);
    until("three processes", || bench.toys().len() == 3).await;
    server.kill().unwrap();
    server.wait().unwrap();
    let start = Instant::now();
    until("the guard ends", || guard.try_wait().unwrap().is_some()).await;
    assert!(start.elapsed() < Duration::from_secs(3));
    bench.assert_nothing_left();
}

#[tokio::test]
async fn orphans_of_an_earlier_run_are_ended() {
    let bench = Bench::new();
    let (mut server, mut guard) = guard_on_a_leash(&bench, &["--ignore-term", "--escape"]);
    until("three processes", || bench.toys().len() == 3).await;
    guard.kill().unwrap();
    guard.wait().unwrap();
    server.kill().unwrap();
    server.wait().unwrap();
    assert_eq!(bench.marked().len(), 3, "nobody is left to end them");
    let other = Bench::new();
    assert_eq!(end_orphans(&other.around.data_dir_id, GRACE, None).await, 0);
    assert_eq!(bench.marked().len(), 3, "of another data dir");
    assert_eq!(end_orphans(&bench.around.data_dir_id, GRACE, None).await, 3);
    bench.assert_nothing_left();
    assert_eq!(end_orphans(&bench.around.data_dir_id, GRACE, None).await, 0);
}

#[test]
fn the_guard_passes_its_workers_exit_on() {
    let guard = |words: &[&str]| {
        let mut child = Command::new(env!("CARGO_BIN_EXE_roundhouse"))
            .args(["guard", "--grace-ms", "100", "--"])
            .args(words)
            .stdin(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let lifeline = child.stdin.take();
        let code = child.wait().unwrap().code();
        drop(lifeline);
        code
    };
    assert_eq!(guard(&["sh", "-c", "exit 7"]), Some(7));
    assert_eq!(guard(&["sh", "-c", "kill -KILL $$"]), Some(137));
    assert_eq!(guard(&["/no/such/program"]), Some(127));
}

/// A bench with one GPU that a folder plays, and a toy that takes 5 GB of it.
fn on_one_gpu() -> (tempfile::TempDir, Bench, ModelSpec) {
    let gpus = tempfile::tempdir().unwrap();
    let card = r#"[{"index":0,"name":"Fake","total_bytes":80000000000}]"#;
    std::fs::write(gpus.path().join("gpus.json"), card).unwrap();
    let mut bench = Bench::with_gpus(Some(&format!("dir:{}", gpus.path().display())));
    bench.tempo.memory_limit = Duration::from_millis(300);
    let memory_dir = gpus.path().display().to_string();
    let mut spec = bench.spec(&["--memory-dir", &memory_dir, "--memory-bytes", "5000000000"]);
    spec.gpus = 1;
    (gpus, bench, spec)
}

async fn load_on_gpu(worker: &mut Worker) -> Report {
    worker.handle.order_on(Order::Load, GpuSet::one(0), None);
    worker.settled().await
}

#[tokio::test]
async fn memory_of_a_stopped_worker_is_free_when_the_driver_shows_its_processes_no_more() {
    let (gpus, mut bench, spec) = on_one_gpu();
    bench.tempo.memory_limit = Duration::from_secs(20);
    let mut worker = bench.supervise(spec);
    assert!(matches!(load_on_gpu(&mut worker).await, Report::Ready { .. }));
    let toy = bench.toys()[0];
    // Another program comes, so that the use never is what it was before.
    std::fs::write(gpus.path().join("1"), "60000000000").unwrap();
    worker.handle.order(Order::Stop);
    until("the toy is gone", || !is_alive(toy)).await;
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert!(worker.reports.try_recv().is_err(), "its memory is still in use");
    std::fs::remove_file(gpus.path().join(toy.to_string())).unwrap();
    let report = worker.settled().await;
    assert!(matches!(report, Report::Stopped { stop_ms } if stop_ms < 15_000), "{report:?}");
}

#[tokio::test]
async fn nothing_is_loaded_where_an_ended_worker_has_left_memory_in_use() {
    let (gpus, bench, spec) = on_one_gpu();
    for shows_pids in [true, false] {
        if !shows_pids {
            std::fs::write(gpus.path().join("no-pids"), "").unwrap();
        }
        let mut worker = bench.supervise(spec.clone());
        assert!(matches!(load_on_gpu(&mut worker).await, Report::Ready { .. }));
        let toy = bench.toys().into_iter().find(|pid| is_alive(*pid)).unwrap();
        // The driver keeps it in use: nobody removes the file.
        worker.stop().await;
        let mut next = bench.supervise(spec.clone());
        let Report::LoadFailed { error, .. } = load_on_gpu(&mut next).await else { panic!("loaded") };
        let left = "the worker of `toy` that was on gpu0 has ended, and 4.7 GiB are still in use there: ";
        assert!(error.message.contains(left), "{}", error.message);
        let whose =
            if shows_pids { format!("process {toy} has 4.7 GiB of gpu0") } else { "does not say by whom".into() };
        assert!(error.message.contains(&whose) && error.message.contains("end these processes"), "{}", error.message);
        std::fs::remove_file(gpus.path().join(toy.to_string())).unwrap();
        next.handle.order(Order::Retry);
        while next.settled().await != Report::Available {}
        assert!(matches!(load_on_gpu(&mut next).await, Report::Ready { .. }));
        let toy = bench.toys().into_iter().find(|pid| is_alive(*pid)).unwrap();
        next.handle.order(Order::Stop);
        until("the toy is gone", || !is_alive(toy)).await;
        std::fs::remove_file(gpus.path().join(toy.to_string())).unwrap();
        assert!(matches!(next.settled().await, Report::Stopped { .. }));
    }
}

#[tokio::test]
async fn memory_that_is_left_in_use_keeps_nobody_waiting_who_has_room_all_the_same() {
    let (_gpus, mut bench, mut spec) = on_one_gpu();
    spec.memory = Some(8_000_000_000);
    let mut worker = bench.supervise(spec.clone());
    assert!(matches!(load_on_gpu(&mut worker).await, Report::Ready { .. }));
    // The driver keeps it in use: nobody removes the file.
    worker.stop().await;
    // Whoever waited for it would not be ready within the limit of a test.
    bench.tempo.memory_limit = Duration::from_secs(3600);
    let mut next = bench.supervise(spec);
    assert!(matches!(load_on_gpu(&mut next).await, Report::Ready { .. }));
}

/// A driver that fails to answer once when it is told to. 20 GiB are others'.
#[derive(Default)]
struct Hiccup {
    fails: std::sync::atomic::AtomicBool,
}

impl GpuProbe for Hiccup {
    fn gpus(&self) -> Vec<gpu::Gpu> {
        let card = gpu::Gpu { index: 0, name: "odd".into(), total_bytes: 80 << 30, used_bytes: 20 << 30 };
        let fails = self.fails.swap(false, std::sync::atomic::Ordering::SeqCst);
        if fails { Vec::new() } else { vec![card] }
    }
}

#[tokio::test]
async fn a_driver_that_fails_to_answer_has_not_said_that_nothing_is_in_use() {
    let driver = Arc::new(Hiccup::default());
    let mut bench = Bench::new();
    bench.around.gpus = driver.clone();
    bench.tempo.memory_limit = Duration::from_secs(20);
    let mut worker = bench.supervise(ModelSpec { gpus: 1, ..bench.spec(&["--device-bytes", "1000000000"]) });
    worker.handle.order_on(Order::Load, GpuSet::one(0), None);
    while !matches!(worker.settled().await, Report::Ready { .. }) {}
    // Taken for 0, what is in use would be waited for as long as there is time.
    driver.fails.store(true, std::sync::atomic::Ordering::SeqCst);
    worker.handle.order(Order::Stop);
    let report = worker.settled().await;
    assert!(matches!(report, Report::Stopped { stop_ms } if stop_ms < 15_000), "{report:?}");
}

#[path = "worker_supervisor/drivers.rs"]
mod drivers;
#[path = "worker_supervisor/ports.rs"]
mod ports;
#[path = "worker_supervisor/sleep.rs"]
mod sleep;

#[path = "worker_supervisor/loads.rs"]
mod loads;

#[path = "worker_supervisor/neighbours.rs"]
mod neighbours;
