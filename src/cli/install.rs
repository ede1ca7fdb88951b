//! `roundhouse models install`: makes the environments of models by `scripts/install.sh`, which works without this program
//! and so is where it is known how.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context as _, bail};
use clap::Args;
use tokio::process::Command;

use super::environment;
use crate::config::{self, Config};
use crate::domain::{Launch, ModelSpec};

/// Which models to install, and how.
#[derive(Clone, Debug, Args)]
pub struct InstallArgs {
    /// Model file
    #[arg(long, default_value = "models.yaml", env = "ROUNDHOUSE_CONFIG")]
    pub config: PathBuf,
    /// All models of the file that have an environment of their own
    #[arg(long, conflicts_with = "names")]
    pub all: bool,
    /// CPU packages, even if a GPU is there
    #[arg(long, conflicts_with = "gpu")]
    pub cpu: bool,
    /// Fail if no NVIDIA driver answers
    #[arg(long)]
    pub gpu: bool,
    /// Install again, even where nothing changed
    #[arg(long)]
    pub force: bool,
    /// Names of models
    #[arg(required_unless_present = "all")]
    pub names: Vec<String>,
}

/// Installs the models. A model that is installed in another way is an error if it was named, and told if it was not; one that
/// should be installed and cannot be is an error, after the others.
pub(super) async fn install(args: &InstallArgs, out: &mut dyn Write) -> anyhow::Result<ExitCode> {
    let config = config::load(&args.config, &environment)?;
    let mut by_script: BTreeMap<PathBuf, Vec<String>> = BTreeMap::new();
    let mut left_out = Vec::new();
    for spec in chosen(&config, args)? {
        match place(spec) {
            Ok(Place { script, folder }) => {
                let folders = by_script.entry(script).or_default();
                // Several entries may run one server.py.
                if !folders.contains(&folder) {
                    folders.push(folder);
                }
            }
            Err(NotHere::Elsewhere(why)) if args.all => writeln!(out, "{}: {why}", spec.name)?,
            Err(NotHere::Lacking(why)) if args.all => left_out.push(format!("{}: {why}", spec.name)),
            Err(NotHere::Elsewhere(why) | NotHere::Lacking(why)) => bail!("{}: {why}", spec.name),
        }
    }
    out.flush()?;
    for (script, folders) in &by_script {
        let flags = [("--cpu", args.cpu), ("--gpu", args.gpu), ("--force", args.force)];
        let flags = flags.into_iter().filter(|(_, given)| *given).map(|(flag, _)| flag);
        let mut command = Command::new(script);
        let status = command.args(flags).args(folders).kill_on_drop(true).status().await;
        let status = status.with_context(|| format!("cannot run {}", script.display()))?;
        if !status.success() {
            bail!("not installed: {} ended with {status}; its lines above say why", script.display());
        }
    }
    if !left_out.is_empty() {
        bail!("not installed: {}", left_out.join("\n"));
    }
    Ok(ExitCode::SUCCESS)
}

fn chosen<'a>(config: &'a Config, args: &InstallArgs) -> anyhow::Result<Vec<&'a ModelSpec>> {
    if args.all {
        return Ok(config.models.iter().collect());
    }
    let find = |name: &String| {
        let found = config.models.iter().find(|spec| spec.name == *name || spec.aliases.contains(name));
        found.with_context(|| {
            let all: Vec<&str> = config.models.iter().map(|spec| spec.name.as_str()).collect();
            format!("{} has no model `{name}`; there are: {}", config.path.display(), all.join(", "))
        })
    };
    args.names.iter().map(find).collect()
}

/// What installs a model.
#[derive(Debug, PartialEq)]
struct Place {
    /// `scripts/install.sh` of the folder that its `models/` is in.
    script: PathBuf,
    /// Name of its folder in there.
    folder: String,
}

/// Why a model is not installed by us.
#[derive(Debug)]
enum NotHere {
    /// That is not for us to do.
    Elsewhere(String),
    /// Something is missing.
    Lacking(String),
}

/// Where a model is installed.
fn place(spec: &ModelSpec) -> Result<Place, NotHere> {
    let Launch::Script { python, script } = &spec.launch else {
        return Err(NotHere::Elsewhere("it runs by `command`, so its program is installed in its own way".to_owned()));
    };
    let folder = script.parent().unwrap_or(Path::new("/"));
    if *python != Launch::own_python(script) {
        let why = format!("its `python` is {}, an environment that is not made here", python.display());
        return Err(NotHere::Elsewhere(why));
    }
    if !folder.join("requirements.txt").is_file() {
        let why = format!("there is no {}", folder.join("requirements.txt").display());
        // Whoever made its environment knows how.
        return Err(if python.is_file() { NotHere::Elsewhere(why) } else { NotHere::Lacking(why) });
    }
    let name = folder.file_name().and_then(|name| name.to_str());
    let models = folder.parent().filter(|models| models.file_name().is_some_and(|name| name == "models"));
    let install = models.and_then(Path::parent).map(|root| root.join("scripts/install.sh"));
    match (install.filter(|install| install.is_file()), name) {
        (Some(install), Some(name)) => Ok(Place { script: install, folder: name.to_owned() }),
        _ => {
            let shown = folder.display();
            Err(NotHere::Lacking(format!(
                "there is no scripts/install.sh beside its models folder; by hand: `uv venv {shown}/.venv` and `uv pip install \
                 --torch-backend=auto --python {shown}/.venv -r {shown}/requirements.txt`, and the base service, models/base of \
                 Roundhouse's repository; `pip install uv` gets uv"
            )))
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::*;

    /// A repository with a stand-in for the script, which writes down what it is asked for.
    fn repository(script: &str) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        for model in ["toy", "other"] {
            let folder = dir.path().join("models").join(model);
            std::fs::create_dir_all(&folder).unwrap();
            std::fs::write(folder.join("server.py"), "").unwrap();
            std::fs::write(folder.join("requirements.txt"), "").unwrap();
        }
        if !script.is_empty() {
            let scripts = dir.path().join("scripts");
            std::fs::create_dir(&scripts).unwrap();
            std::fs::write(scripts.join("script"), script).unwrap();
            let stand_in = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/interpreter.sh");
            std::os::unix::fs::symlink(stand_in, scripts.join("install.sh")).unwrap();
        }
        let yaml = "models:\n  a: {type: text, service_script: models/toy/server.py, aliases: [alias]}\n  b: {type: text, service_script: models/toy/server.py}\n  c: {type: text, service_script: models/other/server.py}\n  own: {type: text, command: vllm serve}\n  mine: {type: text, service_script: models/toy/server.py, python: python3}\n";
        std::fs::write(dir.path().join("models.yaml"), yaml).unwrap();
        dir
    }

    async fn run(dir: &tempfile::TempDir, words: &[&str]) -> (anyhow::Result<ExitCode>, String) {
        #[derive(clap::Parser)]
        struct Cli {
            #[command(flatten)]
            args: InstallArgs,
        }
        let config = dir.path().join("models.yaml");
        let own = ["install", "--config", config.to_str().unwrap()];
        let args = Cli::parse_from(own.iter().chain(words)).args;
        let mut out = Vec::new();
        (install(&args, &mut out).await, String::from_utf8(out).unwrap())
    }

    const NOTES: &str = r#"echo "$*" >"$(dirname "$0")/asked""#;

    fn asked(dir: &tempfile::TempDir) -> String {
        std::fs::read_to_string(dir.path().join("scripts/asked")).unwrap()
    }

    #[tokio::test]
    async fn the_script_is_asked_for_folders_each_once() {
        let dir = repository(NOTES);
        run(&dir, &["--cpu", "--force", "alias", "b", "c"]).await.0.unwrap();
        assert_eq!(asked(&dir), "--cpu --force toy other\n");
        let (done, said) = run(&dir, &["--all"]).await;
        done.unwrap();
        assert_eq!(asked(&dir), "toy other\n");
        assert!(said.contains("own: it runs by `command`") && said.contains("mine: its `python` is python3"), "{said}");
    }

    #[tokio::test]
    async fn what_cannot_be_installed_says_why() {
        let dir = repository(NOTES);
        for (name, part) in
            [("own", "by `command`"), ("mine", "`python` is python3"), ("none", "there are: a, b, c, own")]
        {
            let error = run(&dir, &[name]).await.0.unwrap_err().to_string();
            assert!(error.contains(part), "{name}: {error}");
        }
        let dir = repository("exit 3");
        let error = run(&dir, &["a"]).await.0.unwrap_err().to_string();
        assert!(error.contains("install.sh ended with exit status: 3"), "{error}");
        let dir = repository("");
        let error = run(&dir, &["a"]).await.0.unwrap_err().to_string();
        assert!(error.contains("there is no scripts/install.sh") && error.contains("pip install uv"), "{error}");
        let (done, said) = run(&dir, &["--all"]).await;
        let error = done.unwrap_err().to_string();
        assert!(error.starts_with("not installed: a: there is no scripts/install.sh"), "{error}");
        assert!(error.contains("\nc: there is no") && said.contains("own: it runs by `command`"), "{error}, {said}");
    }

    #[tokio::test]
    async fn of_all_those_that_can_be_installed_are() {
        let dir = repository(NOTES);
        std::fs::remove_file(dir.path().join("models/toy/requirements.txt")).unwrap();
        let error = run(&dir, &["--all"]).await.0.unwrap_err().to_string();
        assert!(error.contains("models/toy/requirements.txt"), "{error}");
        assert_eq!(asked(&dir), "other\n");
        let own = dir.path().join("models/toy/.venv/bin");
        std::fs::create_dir_all(&own).unwrap();
        std::fs::write(own.join("python"), "").unwrap();
        run(&dir, &["--all"]).await.0.unwrap();
    }
}
