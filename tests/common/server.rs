//! One folder with a model file and a data dir, and servers started on it, one after the other.

use std::fs::File;
use std::io::{BufRead as _, BufReader};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Map, Value, json};
use tempfile::TempDir;
use tokio::sync::mpsc;

use super::procs::{self, Proc};
use super::{Api, LIMIT, eventually, within};

/// How long the processes of a killed server may live on; beyond it they are said to be left behind.
const GONE_WITHIN: Duration = Duration::from_secs(15);

/// A model file in the making, and the data dir that goes with it.
pub(crate) struct Site {
    dir: Arc<TempDir>,
    models: Map<String, Value>,
    server: Map<String, Value>,
    scheduler: Map<String, Value>,
    storage: Map<String, Value>,
    env: Vec<(String, String)>,
    listen: String,
}

impl Site {
    /// No model yet, and times that suit tests.
    pub(crate) fn new() -> Self {
        let Value::Object(server) = json!({
            "worker_grace": "2s", "backoff_first": "200ms", "backoff_max": "1s", "shutdown_grace": "20s",
        }) else {
            unreachable!()
        };
        Self {
            dir: Arc::new(tempfile::tempdir().unwrap()),
            models: Map::new(),
            server,
            scheduler: Map::new(),
            storage: Map::new(),
            env: Vec::new(),
            listen: "127.0.0.1:0".to_owned(),
        }
    }

    /// Adds a model; see [`echo`].
    pub(crate) fn model(mut self, name: &str, entry: Value) -> Self {
        self.models.insert(name.to_owned(), entry);
        self
    }

    /// Takes a model out.
    pub(crate) fn without_model(mut self, name: &str) -> Self {
        self.models.remove(name);
        self
    }

    /// Sets a key of `server:`.
    pub(crate) fn server(mut self, key: &str, value: impl Into<Value>) -> Self {
        self.server.insert(key.to_owned(), value.into());
        self
    }

    /// Sets a key of `scheduler:`.
    pub(crate) fn scheduler(mut self, key: &str, value: impl Into<Value>) -> Self {
        self.scheduler.insert(key.to_owned(), value.into());
        self
    }

    /// Sets a key of `storage:`.
    pub(crate) fn storage(mut self, key: &str, value: impl Into<Value>) -> Self {
        self.storage.insert(key.to_owned(), value.into());
        self
    }

    /// Sets an environment variable of the server.
    pub(crate) fn env(mut self, name: &str, value: &str) -> Self {
        self.env.retain(|(known, _)| known != name);
        self.env.push((name.to_owned(), value.to_owned()));
        self
    }

    /// Where the server listens, instead of a free port of the loopback.
    pub(crate) fn listen(mut self, listen: &str) -> Self {
        listen.clone_into(&mut self.listen);
        self
    }

    /// The folder of everything; its `device` plays the device's memory.
    pub(crate) fn path(&self) -> &Path {
        self.dir.path()
    }

    /// The data dir.
    pub(crate) fn data(&self) -> PathBuf {
        self.dir.path().join("data")
    }

    /// A folder for echo's `--device-memory-dir`.
    pub(crate) fn device(&self) -> PathBuf {
        let device = self.dir.path().join("device");
        std::fs::create_dir_all(&device).unwrap();
        device
    }

    /// Flags for an echo worker that fills a device which holds one model only.
    pub(crate) fn whole_device(&self) -> Vec<String> {
        let device = self.device().display().to_string();
        ["--device-memory-dir", &device, "--device-memory-bytes", "10", "--device-total-bytes", "15"]
            .map(str::to_owned)
            .to_vec()
    }

    /// Where the model file is.
    pub(crate) fn config(&self) -> PathBuf {
        self.dir.path().join("models.yaml")
    }

    /// Writes the model file, as a start does.
    pub(crate) fn write(&self) {
        let file = json!({
            "models": self.models, "server": self.server, "scheduler": self.scheduler, "storage": self.storage,
        });
        std::fs::write(self.config(), serde_json::to_string_pretty(&file).unwrap()).unwrap();
    }

    /// Starts the server and waits until it accepts requests.
    pub(crate) async fn start(&self) -> Server {
        self.write();
        let config = self.config();
        let log = self.dir.path().join("server.log");
        let log_file = File::options().create(true).append(true).open(&log).unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_roundhouse"));
        command
            .args(["serve", "--listen", &self.listen])
            .arg("--config")
            .arg(&config)
            .arg("--data-dir")
            .arg(self.data())
            .env_remove("RUNPOD_POD_ID")
            .env_remove("ROUNDHOUSE_API_KEYS")
            .env("ROUNDHOUSE_LOG", "info")
            .env("NO_COLOR", "1")
            .envs(self.env.iter().map(|(name, value)| (name, value)))
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(log_file);
        let mut child = command.spawn().unwrap();
        let mut lines = read_lines(&mut child);
        let mut said = Vec::new();
        let mut server = Server {
            dir: self.dir.clone(),
            child,
            said: Vec::new(),
            data_dir_id: None,
            api: Api::new("http://127.0.0.1:1"),
        };
        let address = within(LIMIT, "the server says where it listens", async {
            while let Some(line) = lines.recv().await {
                said.push(line.clone());
                if let Some((_, rest)) = line.split_once("listening on http://") {
                    return rest.split_whitespace().next().unwrap_or_default().to_owned();
                }
            }
            panic!("the server ended before it listened; it said {said:?}");
        })
        .await;
        server.said = said;
        server.api = Api::new(&format!("http://{}", address.replace("0.0.0.0", "127.0.0.1")));
        server.data_dir_id = Some(roundhouse::store::data_dir_id_of(&self.data()).unwrap());
        server
    }
}

/// A running server. When dropped, it is killed, and whatever of it does not go away by itself fails the test.
pub(crate) struct Server {
    dir: Arc<TempDir>,
    child: Child,
    said: Vec<String>,
    data_dir_id: Option<String>,
    /// A client without a key.
    pub(crate) api: Api,
}

impl Server {
    /// Lines on stdout up to the one with the address.
    pub(crate) fn said(&self) -> &[String] {
        &self.said
    }

    /// Everything logged so far, by this server and earlier ones on the same folder.
    pub(crate) fn log(&self) -> String {
        std::fs::read_to_string(self.dir.path().join("server.log")).unwrap_or_default()
    }

    /// Log of a model's worker, of all its starts.
    pub(crate) fn worker_log(&self, model: &str) -> String {
        std::fs::read_to_string(self.dir.path().join(format!("data/log/{model}.log"))).unwrap_or_default()
    }

    /// Processes that carry this data dir's mark: guards and workers.
    pub(crate) fn processes(&self) -> Vec<Proc> {
        self.data_dir_id.as_deref().map(procs::marked).unwrap_or_default()
    }

    /// The Python process of a model, once it is there.
    pub(crate) async fn worker(&self, model: &str) -> Proc {
        eventually(LIMIT, "a worker process", || async {
            self.processes().into_iter().find(|found| found.serves(model))
        })
        .await
    }

    /// Ends the server with SIGKILL, as the kernel's out-of-memory killer would. Its children are left to themselves.
    pub(crate) fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Sends a signal to the server.
    pub(crate) fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.child.id().cast_signed()), signal).unwrap();
    }

    /// The server's process id.
    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Waits for the server's end.
    pub(crate) async fn ended(&mut self) -> ExitStatus {
        let child = &mut self.child;
        let poll = async {
            loop {
                if let Some(status) = child.try_wait().unwrap() {
                    return status;
                }
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        within(LIMIT, "the server ends", poll).await
    }

    /// From now on its processes are somebody else's: a test that starts the next server says itself what must be gone.
    pub(crate) fn forget_processes(&mut self) {
        self.data_dir_id = None;
    }

    /// Waits until no process of it lives.
    pub(crate) async fn all_gone(&self, limit: Duration) {
        eventually(limit, "no process is left", || async { self.processes().is_empty().then_some(()) }).await;
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // An error here means that it has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
        let left = leftovers(self.data_dir_id.as_deref());
        if std::thread::panicking() {
            let log = self.log();
            let lines: Vec<&str> = log.lines().collect();
            eprintln!("---- last lines of the server's log\n{}", lines[lines.len().saturating_sub(30)..].join("\n"));
            eprintln!("---- it said {:?}; left behind: {left:?}", self.said);
        } else {
            assert!(left.is_empty(), "left behind: {left:?}");
        }
    }
}

/// Waits for the end of a killed server's processes; those that stay are ended and returned.
fn leftovers(data_dir_id: Option<&str>) -> Vec<Proc> {
    let Some(id) = data_dir_id else { return Vec::new() };
    let step = Duration::from_millis(20);
    for _ in 0..GONE_WITHIN.as_millis() / step.as_millis() {
        if procs::marked(id).is_empty() {
            return Vec::new();
        }
        std::thread::sleep(step);
    }
    let left = procs::marked(id);
    left.iter().for_each(|found| found.signal(Signal::SIGKILL));
    left
}

fn read_lines(child: &mut Child) -> mpsc::UnboundedReceiver<String> {
    let (sender, lines) = mpsc::unbounded_channel();
    let stdout = BufReader::new(child.stdout.take().unwrap());
    std::thread::spawn(move || {
        for line in stdout.lines().map_while(Result::ok) {
            // Nobody listens any more: go on, so that the server never blocks on a full pipe.
            let _ = sender.send(line);
        }
    });
    lines
}

/// An entry with an echo worker on the CPU. `kind`: `text`, `image` and `audio` with their usual paths, `custom` with
/// `/echo`, where jobs run one at a time.
pub(crate) fn echo<A: AsRef<str>>(kind: &str, args: &[A]) -> Value {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let script = root.join("models/echo/server.py");
    let mut command = vec![python(root), script.display().to_string()];
    command.extend(["--port", "{port}", "--name", "{name}"].map(str::to_owned));
    command.extend(args.iter().map(|arg| arg.as_ref().to_owned()));
    let mut entry = json!({"type": kind, "command": command, "gpus": 0, "startup_time": 1, "port": free_port()});
    if kind == "custom" {
        entry["endpoint"] = json!("/echo");
    }
    entry
}

/// The entry with more keys set.
pub(crate) fn with(mut entry: Value, more: Value) -> Value {
    let Value::Object(more) = more else { panic!("an object, not {more}") };
    entry.as_object_mut().unwrap().extend(more);
    entry
}

/// An interpreter that has starlette and uvicorn.
pub(crate) fn python(root: &Path) -> String {
    if let Ok(python) = std::env::var("ROUNDHOUSE_TEST_PYTHON") {
        return python;
    }
    let python = root.join(".venv-dev/bin/python");
    assert!(
        python.exists(),
        "{} is missing: run scripts/test.sh, which makes it, or set ROUNDHOUSE_TEST_PYTHON to a Python with starlette \
         and uvicorn",
        python.display()
    );
    python.display().to_string()
}

/// A port that no other test of this process gets, outside the range from which clients' ports are taken.
pub(crate) fn free_port() -> u16 {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    let base = 10_000 + u16::try_from(std::process::id() % 200).unwrap() * 100;
    loop {
        let port = base + NEXT.fetch_add(1, Ordering::Relaxed);
        if TcpListener::bind(("127.0.0.1", port)).is_ok() {
            return port;
        }
    }
}
