//! Spare processes: each has imported what an environment's workers import, and becomes the next worker that is loaded there.
//! One task for each environment, the only owner of its spare until a load takes it.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use tokio::sync::{Mutex, OwnedMutexGuard, mpsc, oneshot, watch};
use tokio::time::{Instant, sleep, sleep_until, timeout};

use crate::domain::worker::{SpareState, SpareView};
use crate::domain::{Launch, ModelSpec};
use crate::worker::health::{Doctor, Health};
use crate::worker::process::{self, Start, WorkerProcess};
use crate::worker::supervisor::{Surroundings, backoff};
use crate::worker::{logs, ports, procfs};

/// Where ports of spares are looked for first: above those that models usually prefer.
const FIRST_PORT: u16 = 8601;
/// How long nobody has to be loading before imports may take the processor's time.
const QUIET: Duration = Duration::from_millis(500);
/// Between two probes while it imports, and the longest answer to one.
const IMPORT_PROBE_EVERY: Duration = Duration::from_millis(100);
/// Longest time of the imports.
const IMPORT_LIMIT: Duration = Duration::from_secs(600);
/// How long a load waits for a spare, since it takes no orders meanwhile; then it starts from nothing.
const TAKE_LIMIT: Duration = Duration::from_secs(2);
/// Between two probes of a spare that waits.
const WATCH_EVERY: Duration = Duration::from_secs(2);
/// Longest answer to a probe.
const PROBE_LIMIT: Duration = Duration::from_secs(5);
/// Probes in a row without a good answer after which a spare is ended.
const WATCH_MISSES: u32 = 3;
/// Orders to one task that may wait.
const MESSAGES_LIMIT: usize = 64;

/// All spare processes of this server. Cheap to clone; the default has none.
#[derive(Clone)]
pub struct Spares {
    keepers: Arc<std::sync::Mutex<Vec<Handle>>>,
    loads: Arc<watch::Sender<usize>>,
    /// What new tasks are started with; `None`: there never are any.
    with: Option<Arc<With>>,
}

struct With {
    around: Surroundings,
    /// One imports at a time.
    turn: Arc<Mutex<()>>,
}

impl Default for Spares {
    fn default() -> Self {
        Self { keepers: Arc::default(), loads: Arc::new(watch::channel(0).0), with: None }
    }
}

/// One task, as seen from outside. It ends when this is dropped.
struct Handle {
    spec: ModelSpec,
    /// Its number among those that there are, for the name of its log.
    index: usize,
    messages: mpsc::Sender<Message>,
    view: watch::Sender<SpareView>,
}

enum Message {
    /// A load wants it.
    Take(oneshot::Sender<Option<WorkerProcess>>),
    /// What came of the one that was taken last.
    Came(Result<(), String>),
}

/// While it lives somebody is loading.
pub(super) struct Loading(Arc<watch::Sender<usize>>);

impl Drop for Loading {
    fn drop(&mut self) {
        self.0.send_modify(|count| *count -= 1);
    }
}

impl Spares {
    /// Starts a task for each environment of the models that want a spare.
    pub fn start(models: &[ModelSpec], around: &Surroundings) -> Self {
        let with = With { around: around.clone(), turn: Arc::default() };
        let spares = Self { with: Some(Arc::new(with)), ..Self::default() };
        spares.edit(models);
        spares
    }

    /// models.yaml was edited: spares of environments that are no more end, those of new ones are started, the others stay.
    pub fn edit(&self, models: &[ModelSpec]) {
        let Some(with) = &self.with else { return };
        let wants = |spec: &&ModelSpec| spec.spare && matches!(spec.launch, Launch::Script { .. });
        let mut keepers = self.keepers();
        let before: Vec<usize> = keepers.iter().map(|keeper| keeper.index).collect();
        keepers.retain(|keeper| models.iter().filter(wants).any(|spec| is_one_environment(&keeper.spec, spec)));
        for spec in models.iter().filter(wants) {
            if !keepers.iter().any(|keeper| is_one_environment(&keeper.spec, spec)) {
                let index = (0..).find(|index| keepers.iter().all(|keeper| keeper.index != *index)).unwrap_or(0);
                keepers.push(self.keep(spec.clone(), index, with));
            }
        }
        for keeper in keepers.iter() {
            let sharing = models.iter().filter(wants).filter(|spec| is_one_environment(&keeper.spec, spec));
            let sharing = sharing.map(|spec| spec.name.clone()).collect();
            keeper.view.send_modify(|view| view.models = sharing);
        }
        let new = keepers.iter().filter(|keeper| !before.contains(&keeper.index));
        if let Some(text) = not_installed(new.map(|keeper| (&keeper.spec, keeper.view.borrow().models.join(", ")))) {
            tracing::warn!("{text}");
        }
    }

    fn keep(&self, spec: ModelSpec, index: usize, with: &With) -> Handle {
        let around = &with.around;
        let log_path = logs::spare_path(&around.log_dir, &folder(&spec), index);
        let (view, _) = watch::channel(SpareView {
            models: Vec::new(),
            state: SpareState::Absent,
            pid: None,
            port: None,
            host_bytes: None,
            starts: 0,
            taken: 0,
            reason: None,
            log_path: log_path.display().to_string(),
        });
        let (messages, inbox) = mpsc::channel(MESSAGES_LIMIT);
        let keeper = Keeper {
            spec: spec.clone(),
            log_path,
            around: around.clone(),
            inbox,
            loads: self.loads.subscribe(),
            turn: with.turn.clone(),
            view: view.clone(),
            failures: 0,
            not_before: Instant::now(),
        };
        around.tasks.spawn("spare", keeper.run());
        Handle { spec, index, messages, view }
    }

    fn keepers(&self) -> MutexGuard<'_, Vec<Handle>> {
        self.keepers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How each is; may be stale.
    pub fn views(&self) -> Vec<SpareView> {
        self.keepers().iter().map(|keeper| keeper.view.borrow().clone()).collect()
    }

    /// Somebody loads from now on, and nobody else is to import meanwhile.
    pub(super) fn loading(&self) -> Loading {
        self.loads.send_modify(|count| *count += 1);
        Loading(self.loads.clone())
    }

    /// The spare of a model's environment, if one is there and answers in time. What comes of it is to be told by
    /// [`Self::came`].
    pub(super) async fn take(&self, spec: &ModelSpec) -> Option<WorkerProcess> {
        let messages = self.messages(spec)?;
        let (reply, answer) = oneshot::channel();
        let asked = async {
            messages.send(Message::Take(reply)).await.ok()?;
            answer.await.ok().flatten()
        };
        timeout(TAKE_LIMIT, asked).await.ok().flatten()
    }

    /// Whether the one that was taken last has become a worker.
    pub(super) async fn came(&self, spec: &ModelSpec, of_it: Result<(), String>) {
        if let Some(messages) = self.messages(spec) {
            // An error: the server ends, or its environment is no more.
            let _ = messages.send(Message::Came(of_it)).await;
        }
    }

    /// To the task of a model's environment, if the model wants a spare.
    fn messages(&self, spec: &ModelSpec) -> Option<mpsc::Sender<Message>> {
        let keepers = self.keepers();
        let keeper = keepers.iter().find(|keeper| spec.spare && is_one_environment(&keeper.spec, spec));
        keeper.map(|keeper| keeper.messages.clone())
    }
}

/// What to say once about the environments that are not installed yet, with the models that share them.
fn not_installed<'a>(environments: impl Iterator<Item = (&'a ModelSpec, String)>) -> Option<String> {
    let lacks = environments.filter(|(spec, _)| spec.launch.is_not_installed());
    let models: Vec<String> = lacks.map(|(_, models)| models).collect();
    (!models.is_empty()).then(|| {
        let models = models.join(", ");
        format!(
            "no spare processes for {models}: not installed yet; run `roundhouse models install`, with names or --all"
        )
    })
}

/// Whether one spare is good for both: the same interpreter runs the same script, and imports see the same variables.
fn is_one_environment(a: &ModelSpec, b: &ModelSpec) -> bool {
    matches!(a.launch, Launch::Script { .. }) && a.launch == b.launch && a.env == b.env && a.dir == b.dir
}

/// The name of its script's folder.
fn folder(spec: &ModelSpec) -> String {
    let folder = match &spec.launch {
        Launch::Script { script, .. } => script.parent().and_then(|parent| parent.file_name()),
        Launch::Command(_) => None,
    };
    folder.map_or_else(|| spec.name.clone(), |name| name.to_string_lossy().into_owned())
}

/// How it went with one spare.
enum End {
    /// A load has it.
    Taken,
    /// Its code has been edited since it was started.
    Outdated,
    Failed(String),
    /// The server ends.
    Over,
}

struct Keeper {
    /// One of the models that share it.
    spec: ModelSpec,
    log_path: PathBuf,
    around: Surroundings,
    inbox: mpsc::Receiver<Message>,
    /// How many are loading.
    loads: watch::Receiver<usize>,
    /// One imports at a time.
    turn: Arc<Mutex<()>>,
    view: watch::Sender<SpareView>,
    /// In a row.
    failures: u32,
    not_before: Instant,
}

impl Keeper {
    async fn run(mut self) {
        while let Some(turn) = self.turn().await {
            match self.keep(turn).await {
                End::Taken => {
                    self.view.send_modify(|v| v.taken += 1);
                    self.enter(SpareState::Absent, None);
                }
                End::Outdated => self.enter(SpareState::Absent, None),
                End::Failed(reason) => self.failed(reason),
                End::Over => break,
            }
        }
        self.enter(SpareState::Absent, None);
    }

    /// Comes back when nobody loads or imports and the last failure is long enough ago; `None`: the server ends.
    async fn turn(&mut self) -> Option<OwnedMutexGuard<()>> {
        loop {
            let (not_before, turn, mut loads) = (self.not_before, self.turn.clone(), self.loads.clone());
            let soft = self.around.tasks.soft().clone();
            let view = self.view.clone();
            let mut mine = std::pin::pin!(async move {
                sleep_until(not_before).await;
                pause_is_over(&view);
                loop {
                    let turn = turn.clone().lock_owned().await;
                    loads.wait_for(|count| *count == 0).await.ok()?;
                    if timeout(QUIET, loads.wait_for(|count| *count > 0)).await.is_err() {
                        return Some(turn);
                    }
                }
            });
            loop {
                tokio::select! {
                    biased;
                    () = soft.cancelled() => return None,
                    message = self.inbox.recv() => match message? {
                        Message::Take(reply) => drop(reply.send(None)),
                        Message::Came(of_it) => {
                            self.note(of_it);
                            break;
                        }
                    },
                    turn = &mut mine => return turn,
                }
            }
        }
    }

    /// From its start until it is taken or gone.
    async fn keep(&mut self, turn: OwnedMutexGuard<()>) -> End {
        let gpus = self.only_gpu().await;
        let code = self.code().await;
        let mut process = match self.start(&gpus) {
            Ok(process) => process,
            Err(reason) => return End::Failed(reason),
        };
        let (soft, grace) = (self.around.tasks.soft().clone(), self.around.grace);
        let doctor = Doctor::new(process.port(), process.mark());
        self.enter(SpareState::Importing, Some(&process));
        let mut turn = Some(turn);
        let (mut has_answered, mut misses) = (false, 0);
        let deadline = Instant::now() + IMPORT_LIMIT;
        loop {
            let every = if turn.is_some() { IMPORT_PROBE_EVERY } else { WATCH_EVERY };
            let probe = async {
                sleep(every).await;
                doctor.ask(PROBE_LIMIT).await
            };
            let health = tokio::select! {
                biased;
                () = soft.cancelled() => {
                    process.stop(grace).await;
                    return End::Over;
                }
                message = self.inbox.recv() => match message {
                    Some(Message::Take(reply)) if has_answered && self.code().await != code => {
                        drop(reply.send(None));
                        let models = self.view.borrow().models.join(", ");
                        tracing::info!(models, "the code of a spare process has been edited: it is replaced");
                        process.clear_away().await; // It has nothing to save, and others may ask for a spare.
                        return End::Outdated;
                    }
                    // Even while it imports: that is a part of the load which is behind it.
                    Some(Message::Take(reply)) if has_answered => match reply.send(Some(process)) {
                        Ok(()) => return End::Taken,
                        Err(back) => {
                            let Some(back) = back else { return End::Taken };
                            process = back;
                            continue;
                        }
                    },
                    Some(Message::Take(reply)) => {
                        drop(reply.send(None));
                        continue;
                    }
                    Some(Message::Came(of_it)) => {
                        self.note(of_it);
                        continue;
                    }
                    None => {
                        process.stop(grace).await;
                        return End::Over;
                    }
                },
                how = process.exited() => {
                    let tail = process.clear_away().await;
                    return End::Failed(tail.explain(format!("it {how}")));
                }
                () = sleep_until(deadline), if turn.is_some() => {
                    let tail = process.clear_away().await; // As above.
                    return End::Failed(tail.explain(format!("its imports took over {} s", IMPORT_LIMIT.as_secs())));
                }
                health = probe => health,
            };
            let why = match health {
                Health::NotYet { phase, .. } => {
                    (has_answered, misses) = (true, 0);
                    let is_ready = phase.as_deref() == Some("spare");
                    if is_ready {
                        let bytes = host_bytes(&process).await;
                        self.view.send_modify(|v| (v.state, v.host_bytes) = (SpareState::Ready, bytes));
                    }
                    if is_ready && turn.take().is_some() {
                        let models = self.view.borrow().models.join(", ");
                        tracing::info!(models, process.pid = process.pid(), "a spare process is ready");
                    }
                    continue;
                }
                Health::Importing(Ok(())) => {
                    (has_answered, misses) = (true, 0);
                    continue;
                }
                Health::Ready { .. } => "it has a model, though it was started as a spare".to_owned(),
                Health::Importing(Err(why)) | Health::Failed { why, .. } => format!("it says: {why}"),
                Health::Stranger => "another program answers on its port".to_owned(),
                Health::Silent(_) | Health::Refused if turn.is_some() => continue,
                Health::Silent(_) | Health::Refused if misses + 1 < WATCH_MISSES => {
                    misses += 1;
                    continue;
                }
                Health::Silent(_) | Health::Refused => "it stopped answering health probes".to_owned(),
            };
            let tail = process.clear_away().await;
            return End::Failed(tail.explain(why));
        }
    }

    /// The Python files that it is made of, with their sizes and when they were edited.
    async fn code(&self) -> BTreeMap<PathBuf, (u64, Option<SystemTime>)> {
        let folders = self.spec.code_folders();
        let look = move || {
            let entries = folders.iter().filter_map(|folder| std::fs::read_dir(folder).ok()).flatten().flatten();
            let files = entries.map(|entry| entry.path()).filter(|path| path.extension().is_some_and(|it| it == "py"));
            files.filter_map(|path| path.metadata().ok().map(|it| (path, (it.len(), it.modified().ok())))).collect()
        };
        process::blocking(look).await.unwrap_or_default()
    }

    /// The GPU of a box that has one: it can be chosen before anything is imported. An import that initialises CUDA fixes the
    /// choice, and transformers' do with some packages beside it.
    async fn only_gpu(&self) -> Vec<u32> {
        let probe = self.around.gpus.clone();
        let gpus = process::blocking(move || probe.gpus()).await.unwrap_or_default();
        if let [gpu] = gpus.as_slice() { vec![gpu.index] } else { Vec::new() }
    }

    fn start(&self, gpus: &[u32]) -> Result<WorkerProcess, String> {
        let port = FIRST_PORT + u16::try_from(std::process::id() % 300).unwrap_or(0);
        let lease = ports::lease(port, &[].into()).ok_or("no port from 8001 to 8999 is free on 127.0.0.1")?;
        let start = Start {
            park_bytes: None,
            free_bytes: None,
            spec: &self.spec,
            replica: 0,
            gpus,
            is_small: false,
            data_dir_id: &self.around.data_dir_id,
            log_dir: &self.around.log_dir,
            program: &self.around.program,
            grace: self.around.grace,
            tasks: &self.around.tasks,
        };
        WorkerProcess::start_spare(&start, lease, self.log_path.clone())
    }

    fn note(&mut self, came_of_it: Result<(), String>) {
        match came_of_it {
            Ok(()) => self.failures = 0,
            Err(reason) => self.failed(reason),
        }
    }

    fn failed(&mut self, reason: String) {
        self.failures += 1;
        let wait = backoff(self.around.backoff_first, self.around.backoff_max, self.failures);
        let models = self.view.borrow().models.join(", ");
        // Of what is not installed, one line was for all.
        if !self.spec.launch.is_not_installed() {
            tracing::warn!(
                models,
                failures = self.failures,
                "no spare process, so loads start from nothing; tried again in {} s: {reason}",
                wait.as_secs_f64()
            );
        }
        self.not_before = Instant::now() + wait;
        self.enter(SpareState::Backoff, None);
        self.view.send_modify(|v| v.reason = Some(reason));
    }

    fn enter(&self, state: SpareState, process: Option<&WorkerProcess>) {
        self.view.send_modify(|v| {
            v.state = state;
            v.pid = process.map(WorkerProcess::pid);
            v.port = process.map(WorkerProcess::port);
            v.host_bytes = None;
            v.starts += u64::from(process.is_some());
            if process.is_some() {
                v.reason = None;
            }
        });
    }
}

/// The pause after a failure is over: what it waits for from now on is that nobody loads.
fn pause_is_over(view: &watch::Sender<SpareView>) {
    view.send_if_modified(|v| {
        let is_over = v.state == SpareState::Backoff;
        if is_over {
            v.state = SpareState::Absent;
        }
        is_over
    });
}

/// Host memory of its processes, in bytes.
async fn host_bytes(process: &WorkerProcess) -> Option<u64> {
    let family = process.family();
    let sum = move || family.living(None).iter().filter_map(|found| procfs::resident_bytes(found.pid)).sum();
    tokio::task::spawn_blocking(sum).await.ok()
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::worker::process::tests::spec;

    #[test]
    fn of_all_environments_that_are_not_installed_one_line_is_said() {
        let dir = tempfile::tempdir().unwrap();
        let entry = |name: &str, python: Option<&str>| {
            let script = dir.path().join(name).join("server.py");
            let python = python.map_or_else(|| Launch::own_python(&script), Into::into);
            ModelSpec { name: name.into(), launch: Launch::Script { python, script }, ..spec(&[]) }
        };
        let (a, b, own) = (entry("a", None), entry("b", None), entry("own", Some("/mine/python")));
        let say = |specs: &[&ModelSpec]| not_installed(specs.iter().map(|spec| (*spec, spec.name.clone())));
        let said = say(&[&a, &own, &b]).unwrap();
        assert!(said.starts_with("no spare processes for a, b: not installed yet; run `roundhouse models"), "{said}");
        assert_eq!(say(&[&own]), None, "that is no matter of installing");
        std::fs::create_dir_all(dir.path().join("a/.venv/bin")).unwrap();
        std::fs::write(dir.path().join("a/.venv/bin/python"), "").unwrap();
        assert_eq!(say(&[&a]), None);
    }

    #[test]
    fn models_share_a_spare_if_their_imports_are_the_same() {
        let script = |script: &str| Launch::Script { python: "/venv/python".into(), script: script.into() };
        let flux = ModelSpec { launch: script("flux/server.py"), ..spec(&[]) };
        let other = ModelSpec { name: "other".into(), args: vec!["--x".into()], gpus: 1, ..flux.clone() };
        assert!(is_one_environment(&flux, &other));
        assert_eq!(folder(&flux), "flux");
        let music = ModelSpec { launch: script("music/server.py"), ..flux.clone() };
        assert!(!is_one_environment(&flux, &music));
        let with_env = ModelSpec { env: [("PYTHONPATH".to_owned(), "/x".to_owned())].into(), ..flux.clone() };
        assert!(!is_one_environment(&flux, &with_env));
        assert!(!is_one_environment(&spec(&["serve"]), &spec(&["serve"])), "a command knows no --spare");
    }

    /// With a guard that is not there, and backs off for a minute.
    fn around(dir: &Path) -> Surroundings {
        Surroundings {
            clock: Arc::new(crate::clock::SystemClock::default()),
            gpus: crate::worker::gpu::from_setting(Some("none")).unwrap(),
            tasks: crate::lifecycle::Tasks::new(),
            data_dir_id: format!("spare{}", dir.file_name().unwrap().to_string_lossy()),
            log_dir: dir.join("logs"),
            program: dir.join("no-such-program"),
            grace: Duration::from_secs(1),
            stuck: crate::worker::supervisor::StuckMemory::default(),
            backoff_first: Duration::from_secs(60),
            backoff_max: Duration::from_secs(60),
            spares: Spares::default(),
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_load_waits_for_no_spare_whose_task_does_not_answer() {
        let launch = Launch::Script { python: "/venv/python".into(), script: "flux/server.py".into() };
        let spec = ModelSpec { launch, spare: true, ..spec(&[]) };
        let dir = tempfile::tempdir().unwrap();
        let spares = Spares::start(std::slice::from_ref(&spec), &around(dir.path()));
        let (messages, inbox) = mpsc::channel(MESSAGES_LIMIT);
        spares.keepers()[0].messages = messages;
        assert!(timeout(Duration::from_secs(60), spares.take(&spec)).await.unwrap().is_none());
        drop(inbox);
    }

    #[tokio::test(start_paused = true)]
    async fn a_spare_whose_imports_take_too_long_keeps_no_load_waiting_while_it_is_ended() {
        let dir = tempfile::tempdir().unwrap();
        let (script, guard) = (dir.path().join("server.py"), dir.path().join("guard"));
        std::fs::write(&script, "").unwrap();
        // It never answers, and does not end when it is told to.
        std::fs::write(&guard, "#!/bin/sh\nexec sleep 600\n").unwrap();
        std::fs::set_permissions(&guard, std::os::unix::fs::PermissionsExt::from_mode(0o700)).unwrap();
        let grace = Duration::from_secs(3_600);
        let around = Surroundings { program: guard, grace, ..around(dir.path()) };
        let launch = Launch::Script { python: "/bin/sh".into(), script };
        let spec = ModelSpec { launch, spare: true, ..spec(&[]) };
        let spares = Spares::start(std::slice::from_ref(&spec), &around);
        let mut view = spares.keepers()[0].view.subscribe();
        let begun = view.wait_for(|view| view.state == SpareState::Importing).await.map(|_| Instant::now()).unwrap();
        view.wait_for(|view| view.state == SpareState::Backoff).await.unwrap();
        let took = begun.elapsed();
        assert!(took < IMPORT_LIMIT + grace / 2, "{took:?}");
        let reason = spares.views()[0].reason.clone().unwrap();
        assert!(reason.contains("its imports took over 600 s"), "{reason}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_spare_whose_pause_is_over_is_shown_as_one_that_waits_for_loads() {
        let dir = tempfile::tempdir().unwrap();
        let around = around(dir.path());
        let launch = Launch::Script { python: "/venv/python".into(), script: "flux/server.py".into() };
        let spares = Spares::start(&[ModelSpec { launch, spare: true, ..spec(&[]) }], &around);
        let mut view = spares.keepers()[0].view.subscribe();
        view.wait_for(|view| view.state == SpareState::Backoff).await.unwrap();
        let _loading = spares.loading();
        let is_over = timeout(Duration::from_secs(3_600), view.wait_for(|view| view.state == SpareState::Absent)).await;
        assert!(is_over.is_ok(), "{:?}", spares.views());
        assert!(spares.views()[0].reason.is_some(), "why the last one is gone is still told");
    }
}
