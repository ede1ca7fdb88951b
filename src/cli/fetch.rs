//! `roundhouse models fetch`: runs the fetcher in each model's own environment and shows how far it is.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::io::{IsTerminal as _, Write};
use std::path::{Path, PathBuf};
use std::process::{ExitCode, Stdio};
use std::time::Duration;

use anyhow::{Context as _, bail};
use serde::Deserialize;
use tokio::io::{AsyncBufReadExt as _, BufReader};
use tokio::process::{Child, Command};
use tokio::time::Instant;

use super::config::{is_own, python_advice};
use super::{environment, in_words};
use crate::config::{self, Config, is_hub_id};
use crate::domain::{Launch, ModelSpec};

/// How often progress is written where it cannot be written in place.
const LINE_EVERY: Duration = Duration::from_secs(5);

/// Fetches the weights of the named models, or of all that have a Hugging Face id. Tries all; fails if one failed.
pub(super) async fn fetch(path: &Path, names: &[String]) -> anyhow::Result<ExitCode> {
    let config = config::load(path, &environment)?;
    let targets = targets(&config, names)?;
    let mut progress = Progress::on_stderr();
    let mut failed = Vec::new();
    for target in &targets {
        match target.run(&mut progress).await {
            Ok(done) => {
                progress.say(&format!("{}: done, revision {}, in {}", target.name, done.revision, done.path))?
            }
            Err(error) => {
                progress.say(&format!("{}: not fetched: {}", target.name, in_words(&error)))?;
                failed.push(target.name.as_str());
            }
        }
    }
    if !failed.is_empty() {
        bail!(
            "not fetched: {}; the lines above say why. What arrived is kept: run it again to go on",
            failed.join(", ")
        );
    }
    Ok(ExitCode::SUCCESS)
}

/// One model's weights.
struct Target {
    name: String,
    repo: String,
    revision: Option<String>,
    python: PathBuf,
    /// The entry's, as the server's own fetch and the worker have it: where the cache is, and perhaps a token.
    env: BTreeMap<String, String>,
    /// Where the fetcher is found if the environment does not have it.
    python_path: Option<OsString>,
}

/// What the fetcher writes to stdout, a line each.
#[derive(Debug, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
enum Line {
    Progress {
        bytes: u64,
        total_bytes: u64,
        #[serde(default)]
        file: String,
    },
    Done(Done),
    Error {
        code: String,
        message: String,
    },
    #[serde(other)]
    Other,
}

#[derive(Debug, Deserialize)]
struct Done {
    path: String,
    revision: String,
}

fn targets(config: &Config, names: &[String]) -> anyhow::Result<Vec<Target>> {
    if names.is_empty() {
        let with_id = config.models.iter().filter(|spec| spec.model.as_deref().is_some_and(is_hub_id));
        let targets: Vec<Target> = with_id.map(target).collect::<anyhow::Result<_>>()?;
        if targets.is_empty() {
            bail!("no model of {} has a Hugging Face id, so there is nothing to fetch", config.path.display());
        }
        return Ok(targets);
    }
    let known = |name: &String| {
        let spec = config.models.iter().find(|spec| spec.name == *name || spec.aliases.contains(name));
        let Some(spec) = spec else {
            let all: Vec<&str> = config.models.iter().map(|spec| spec.name.as_str()).collect();
            bail!("{} has no model `{name}`; there are: {}", config.path.display(), all.join(", "));
        };
        target(spec)
    };
    names.iter().map(known).collect()
}

fn target(spec: &ModelSpec) -> anyhow::Result<Target> {
    let name = &spec.name;
    let repo = match &spec.model {
        None => bail!("{name} has no `model`, so there is nothing to fetch"),
        Some(folder) if !is_hub_id(folder) => {
            bail!("{name} reads its weights from {folder}; there is nothing to fetch")
        }
        Some(repo) => repo.clone(),
    };
    let Launch::Script { python, .. } = &spec.launch else {
        bail!("{name} runs by `command`, so it has no environment to fetch with; its own program downloads {repo}");
    };
    match python_advice(spec) {
        Some(command) if is_own(spec) => {
            bail!("{name} is not installed yet ({} is missing); run {command} first", python.display())
        }
        Some(advice) => bail!("{name}: {advice}"),
        None => {}
    }
    let given = spec.env.get("PYTHONPATH").map(OsString::from).or_else(|| std::env::var_os("PYTHONPATH"));
    Ok(Target {
        python_path: spec.python_path(given.as_deref()),
        name: name.clone(),
        repo,
        revision: spec.revision.clone(),
        python: python.clone(),
        env: spec.env.clone(),
    })
}

impl Target {
    /// Runs the fetcher to its end.
    async fn run(&self, progress: &mut Progress) -> anyhow::Result<Done> {
        let mut child = self.command().spawn().with_context(|| format!("cannot start {}", self.python.display()))?;
        let answer = self.follow(&mut child, progress).await;
        let status = child.wait().await.context("lost the fetcher")?;
        match answer? {
            Some(Line::Done(done)) if status.success() => Ok(done),
            Some(Line::Error { code, message }) => bail!("{message} ({code})"),
            _ => bail!("the fetcher ended with {status}; its lines above say why"),
        }
    }

    /// HF_TOKEN, HF_HOME and HF_ENDPOINT reach the fetcher through the environment.
    fn command(&self) -> Command {
        let mut command = Command::new(&self.python);
        command.args(["-m", "roundhouse_worker.fetch", "--repo", &self.repo, "--json-progress"]);
        if let Some(revision) = &self.revision {
            command.args(["--revision", revision]);
        }
        command.envs(&self.env).envs(self.python_path.as_ref().map(|path| ("PYTHONPATH", path)));
        command.stdin(Stdio::null()).stdout(Stdio::piped()).kill_on_drop(true);
        command
    }

    /// Shows progress until stdout closes; the last line that says how it ended.
    async fn follow(&self, child: &mut Child, progress: &mut Progress) -> anyhow::Result<Option<Line>> {
        let stdout = child.stdout.take().context("the fetcher has no stdout")?;
        let mut lines = BufReader::new(stdout).lines();
        let mut end = None;
        while let Some(text) = lines.next_line().await.context("cannot read the fetcher's progress")? {
            match serde_json::from_str(&text) {
                Ok(Line::Progress { bytes, total_bytes, file }) => {
                    progress.show(&self.name, bytes, total_bytes, &file)?
                }
                Ok(Line::Other) => {}
                Ok(line) => end = Some(line),
                Err(_) => progress.say(&text)?,
            }
        }
        Ok(end)
    }
}

/// Writes how far a fetch is: in place on a terminal, else a line every few seconds.
struct Progress {
    out: Box<dyn Write + Send>,
    in_place: bool,
    open: bool,
    shown_at: Option<Instant>,
    last: Option<(Instant, u64)>,
    bytes_per_s: f64,
}

impl Progress {
    fn on_stderr() -> Self {
        let stderr = std::io::stderr();
        let in_place = stderr.is_terminal();
        Self::new(Box::new(stderr), in_place)
    }

    fn new(out: Box<dyn Write + Send>, in_place: bool) -> Self {
        Self { out, in_place, open: false, shown_at: None, last: None, bytes_per_s: 0.0 }
    }

    fn show(&mut self, name: &str, bytes: u64, total_bytes: u64, file: &str) -> std::io::Result<()> {
        let now = Instant::now();
        self.measure(now, bytes);
        let is_due = self.shown_at.is_none_or(|at| now.duration_since(at) >= LINE_EVERY) || bytes == total_bytes;
        if !self.in_place && !is_due {
            return Ok(());
        }
        self.shown_at = Some(now);
        let percent = (bytes.saturating_mul(100)).checked_div(total_bytes).unwrap_or(100);
        let text = format!(
            "{name}: {percent:3} %  {:.2} of {:.2} GB  {:.0} MB/s  {file}",
            bytes as f64 / 1e9,
            total_bytes as f64 / 1e9,
            self.bytes_per_s / 1e6
        );
        if self.in_place {
            self.open = true;
            write!(self.out, "\r{text}\x1b[K")?;
        } else {
            writeln!(self.out, "{text}")?;
        }
        self.out.flush()
    }

    /// A smoothed rate; a new fetch begins with fewer bytes than the last one had.
    fn measure(&mut self, now: Instant, bytes: u64) {
        if let Some((at, before)) = self.last.filter(|(_, before)| *before <= bytes) {
            let seconds = now.duration_since(at).as_secs_f64().max(0.001);
            let rate = (bytes - before) as f64 / seconds;
            self.bytes_per_s = if self.bytes_per_s == 0.0 { rate } else { 0.8 * self.bytes_per_s + 0.2 * rate };
        } else {
            self.bytes_per_s = 0.0;
        }
        self.last = Some((now, bytes));
    }

    /// A whole line.
    fn say(&mut self, text: &str) -> std::io::Result<()> {
        if std::mem::take(&mut self.open) {
            writeln!(self.out)?;
        }
        self.shown_at = None;
        writeln!(self.out, "{text}")?;
        self.out.flush()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;

    #[derive(Clone, Default)]
    struct Shared(Arc<Mutex<Vec<u8>>>);

    impl Write for Shared {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    impl Shared {
        fn text(&self) -> String {
            String::from_utf8(self.0.lock().unwrap().clone()).unwrap()
        }
    }

    /// A folder with one model whose interpreter is a shell script.
    fn folder(python: &str) -> (tempfile::TempDir, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let bin = dir.path().join(".venv/bin");
        std::fs::create_dir_all(&bin).unwrap();
        std::fs::create_dir_all(dir.path().join("models/base/roundhouse_worker")).unwrap();
        std::fs::write(dir.path().join("server.py"), "").unwrap();
        if !python.is_empty() {
            std::fs::write(bin.join("script"), python).unwrap();
            let stand_in = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/interpreter.sh");
            std::os::unix::fs::symlink(stand_in, bin.join("python")).unwrap();
        }
        let path = dir.path().join("models.yaml");
        let yaml = "models:\n  m: {type: text, service_script: server.py, model: org/m, revision: v1, env: {HF_HOME: /hf}}\n  folder: {type: text, service_script: server.py, model: ./w}\n  own: {type: text, command: vllm serve, model: org/own}\n";
        std::fs::write(&path, yaml).unwrap();
        (dir, path)
    }

    fn target_of(path: &Path, name: &str) -> anyhow::Result<Target> {
        let config = config::load(path, &|_| None).unwrap();
        targets(&config, &[name.to_owned()]).map(|mut targets| targets.remove(0))
    }

    async fn run(python: &str, in_place: bool) -> (anyhow::Result<Done>, String) {
        let (_dir, path) = folder(python);
        let out = Shared::default();
        let mut progress = Progress::new(Box::new(out.clone()), in_place);
        let done = target_of(&path, "m").unwrap().run(&mut progress).await;
        (done, out.text())
    }

    const STEP: &str =
        r#"echo '{"type":"progress","bytes":500000000,"total_bytes":2000000000,"file":"a.safetensors"}'"#;

    #[tokio::test]
    async fn a_fetch_shows_progress_and_ends() {
        let end =
            r#"echo "{\"type\":\"done\",\"path\":\"/cache/m\",\"revision\":\"abc\",\"bytes\":1,\"args\":\"$*\"}""#;
        let (done, text) = run(&format!("{STEP}\n{end}"), false).await;
        let done = done.unwrap();
        assert_eq!((done.path.as_str(), done.revision.as_str()), ("/cache/m", "abc"));
        assert_eq!(text, "m:  25 %  0.50 of 2.00 GB  0 MB/s  a.safetensors\n");
    }

    #[tokio::test]
    async fn the_fetcher_gets_repository_and_revision() {
        let (_, text) = run(r#"echo "$* $HF_HOME""#, false).await;
        assert_eq!(text, "-m roundhouse_worker.fetch --repo org/m --json-progress --revision v1 /hf\n");
    }

    #[tokio::test]
    async fn an_environment_without_the_base_service_finds_it() {
        let (_, text) = run(r#"echo "$PYTHONPATH""#, false).await;
        assert!(text.trim_end().ends_with("/models/base"), "{text}");
    }

    #[tokio::test]
    async fn a_terminal_is_written_in_place() {
        let (_, text) = run(STEP, true).await;
        assert!(text.starts_with('\r') && text.ends_with("\x1b[K"), "{text:?}");
    }

    #[tokio::test]
    async fn an_error_keeps_its_message_and_code() {
        let (done, _) =
            run(r#"echo '{"type":"error","code":"gated","message":"accept the licence at https://x"}'; exit 1"#, false)
                .await;
        assert_eq!(done.unwrap_err().to_string(), "accept the licence at https://x (gated)");
    }

    #[tokio::test]
    async fn a_fetcher_that_dies_is_no_success() {
        let end = r#"echo '{"type":"done","path":"/p","revision":"r"}'; exit 3"#;
        for python in [end, "exit 0", "kill -9 $$"] {
            let (done, _) = run(python, false).await;
            assert!(done.unwrap_err().to_string().starts_with("the fetcher ended with"), "{python}");
        }
    }

    #[test]
    fn what_cannot_be_fetched_says_why() {
        let (_dir, path) = folder("");
        let error = |name: &str| target_of(&path, name).err().unwrap().to_string();
        assert!(error("m").contains("run roundhouse models install m "), "{}", error("m"));
        assert!(error("folder").contains("there is nothing to fetch"), "{}", error("folder"));
        assert!(error("own").contains("runs by `command`"), "{}", error("own"));
        assert!(error("nope").contains("there are: m, folder, own"), "{}", error("nope"));
    }
}
