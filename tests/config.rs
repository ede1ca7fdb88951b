//! The shipped model files and their JSON Schema.

#![expect(clippy::unwrap_used, reason = "a test may panic, in its helpers too")]

use std::path::{Path, PathBuf};

use roundhouse::config::{self, Config};
use roundhouse::domain::{Launch, ModelKind};
use serde_json::Value;

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

fn text_of(name: &str) -> String {
    std::fs::read_to_string(root().join(name)).unwrap()
}

fn load(name: &str) -> Config {
    config::load(&root().join(name), &|_| None).unwrap_or_else(|error| panic!("{error}"))
}

fn validator() -> jsonschema::Validator {
    let schema: Value = serde_json::from_str(&text_of("docs/models.schema.json")).unwrap();
    jsonschema::validator_for(&schema).unwrap()
}

fn problems(yaml: &str) -> Vec<String> {
    let value: Value = serde_saphyr::from_str(yaml).unwrap();
    validator().iter_errors(&value).map(|error| format!("{}: {error}", error.instance_path)).collect()
}

#[test]
fn the_schema_that_is_checked_in_is_the_generated_one() {
    let path = root().join("docs/models.schema.json");
    if std::env::var_os("ROUNDHOUSE_UPDATE").is_some() {
        std::fs::write(&path, config::schema()).unwrap();
    }
    let checked_in = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(
        checked_in == config::schema(),
        "docs/models.schema.json is out of date: run `ROUNDHOUSE_UPDATE=1 cargo test --test config`"
    );
}

#[test]
fn the_shipped_files_agree_with_the_schema() {
    for name in ["models.yaml", "models.demo.yaml"] {
        let text = text_of(name);
        assert!(text.starts_with("# yaml-language-server: $schema=docs/models.schema.json\n"), "{name}");
        assert_eq!(problems(&text), Vec::<String>::new(), "{name}");
    }
}

#[test]
fn the_schema_refuses_what_the_program_refuses() {
    for yaml in [
        "models: {m: {type: text}}",
        "models: {m: {type: text, command: x, service_script: y}}",
        "models: {m: {command: x}}",
        "models: {m: {type: txt, command: x}}",
        "models: {m: {type: text, command: x, prot: 1}}",
        "models: {m: {type: text, command: x, port: 80}}",
        "models: {m: {type: text, command: x, limit: 0}}",
        "models: {m: {type: text, command: x, timeout: 15x}}",
        "models: {m: {type: text, command: x, memory: many}}",
        "models: {m: {type: text, command: {a: b}}}",
        "models: {m: {type: text, command: x}}\nscheduler: {swap_budget: {other: 2}}",
        "models: {m: {type: text, command: x}}\ntenants: {a: {weight: 0}}",
        "scheduler: {}",
    ] {
        assert_ne!(problems(yaml), Vec::<String>::new(), "the schema takes {yaml}");
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("models.yaml");
        std::fs::write(&path, yaml).unwrap();
        assert!(config::load(&path, &|_| None).is_err(), "the program takes {yaml}");
    }
}

#[test]
fn the_schema_takes_what_the_program_takes() {
    let yaml = "models:\n  m:\n    type: text\n    command: [x, --port, '{port}', 1, true]\n    timeout: 90s\n    startup_time: 1.5\n    memory: 18 GiB\n    env: {A: 1, B: x}\n    args: [1]\nscheduler: {swap_budget: {interactive: 50%, other: 0.15}}\n";
    assert_eq!(problems(yaml), Vec::<String>::new());
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("models.yaml");
    std::fs::write(&path, yaml).unwrap();
    config::load(&path, &|_| None).unwrap();
}

#[test]
fn the_shipped_models_are_the_promised_ones() {
    let config = load("models.yaml");
    let rows: Vec<(&str, ModelKind, u16)> =
        config.models.iter().map(|spec| (spec.name.as_str(), spec.kind, spec.port)).collect();
    assert_eq!(
        rows,
        [("text", ModelKind::Text, 8001), ("flux", ModelKind::Image, 8002), ("musicgen", ModelKind::Audio, 8003)]
    );
    assert_eq!(config.scheduler, roundhouse::policy::Knobs::default(), "the file says that these are the defaults");
    for spec in &config.models {
        let model = spec.model.as_deref().unwrap();
        assert!(config::is_hub_id(model), "{model}");
        assert_eq!(spec.aliases, [model]);
        assert!(spec.memory.unwrap() <= 22 << 30, "{} must fit a 24 GB card", spec.name);
    }
    let text = text_of("models.yaml");
    assert!(text.contains("NOT for commercial use"));
}

#[test]
fn the_demo_is_the_same_models_without_a_gpu() {
    let (real, demo) = (load("models.yaml"), load("models.demo.yaml"));
    for (real, demo) in real.models.iter().zip(&demo.models) {
        assert_eq!((&real.name, real.kind, real.port), (&demo.name, demo.kind, demo.port));
        assert_eq!(real.launch, demo.launch);
        assert_eq!(real.endpoints, demo.endpoints);
        assert_eq!(demo.gpus, 0);
        let folder = Path::new(demo.model.as_deref().unwrap());
        assert!(folder.starts_with(root().join(".cache/checkpoints")), "{}", folder.display());
    }
    assert_eq!(real.models.len(), demo.models.len());
    assert_eq!(demo.models[0].env["VLLM_CPU_KVCACHE_SPACE"], "1");
}

#[test]
fn scripts_run_with_the_interpreter_that_install_makes() {
    for spec in load("models.yaml").models {
        let Launch::Script { python, script } = spec.launch else { panic!("{}", spec.name) };
        let folder = script.parent().unwrap();
        assert_eq!(python, folder.join(".venv/bin/python"));
        assert!(folder.join("requirements.txt").is_file(), "scripts/install.sh knows {}", folder.display());
    }
}

#[test]
fn a_check_whose_output_nobody_reads_ends_without_a_word() {
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_roundhouse"));
    let ended = command
        .args(["config", "check", "--config", "models.yaml"])
        .current_dir(root())
        .stdout(writer)
        .output()
        .unwrap();
    assert_eq!((String::from_utf8_lossy(&ended.stderr).as_ref(), ended.status.code()), ("", Some(141)));
}
