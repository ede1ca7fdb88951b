use std::path::Path;
use std::time::Duration;

use super::{Config, is_hub_id, load, schema};
use crate::domain::{Launch, ModelKind, ModelSpec, Park};
use crate::policy::Knobs;

fn no_env(_: &str) -> Option<String> {
    None
}

/// A folder with a `server.py` and the file; its result.
fn read_with(yaml: &str, env: &dyn Fn(&str) -> Option<String>) -> Result<Config, String> {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("server.py"), "").unwrap();
    let path = dir.path().join("models.yaml");
    std::fs::write(&path, yaml).unwrap();
    load(&path, env).map_err(|error| {
        let folder = format!("{}/", dir.path().display());
        error.to_string().replace(&folder, "")
    })
}

fn read(yaml: &str) -> Result<Config, String> {
    read_with(yaml, &no_env)
}

/// One entry of the given type and settings.
fn entry(settings: &str) -> Result<ModelSpec, String> {
    let yaml = format!("models:\n  m:\n    command: serve --port {{port}}\n{settings}");
    read(&yaml).map(|config| config.models[0].clone())
}

#[test]
fn the_original_keys() {
    let config = read(
        "models:\n  flux:\n    type: image\n    service_script: server.py\n    port: 8002\n    startup_time: 40\n    endpoint: /v1/images/generations\n",
    )
    .unwrap();
    let spec = &config.models[0];
    let dir = config.path.parent().unwrap();
    assert_eq!(spec.name, "flux");
    assert_eq!(spec.kind, ModelKind::Image);
    assert_eq!(spec.launch, Launch::Script { python: dir.join(".venv/bin/python"), script: dir.join("server.py") });
    assert_eq!(spec.port, 8002);
    assert_eq!(spec.startup_time, Duration::from_secs(40));
    assert_eq!(spec.endpoints, ["/v1/images/generations"]);
    assert_eq!((spec.limit, spec.max_batch, spec.first_batch), (8, 8, 1));
    assert_eq!(spec.timeout, Duration::from_secs(300));
    assert_eq!((spec.max_attempts, spec.gpus), (3, 1));
    assert_eq!(spec.upstream_model, "flux");
    assert_eq!(spec.dir, dir);
    assert_eq!(spec.idle_ttl, None);
    assert!(!spec.preload);
}

#[test]
fn every_key_is_read() {
    let spec = entry(
        "    type: audio\n    model: org/music\n    revision: v1\n    port: 8007\n    args: [--rate, 1.10, --fast, true, 'a b']\n    env: {THREADS: 2, MODE: fast, ON: yes}\n    aliases: [org/music, tts-1]\n    limit: 8\n    max_batch: 4\n    timeout: 15m\n    max_attempts: 5\n    idle_ttl: 2h\n    preload: true\n    gpus: 0\n    memory: 18GiB\n    upstream_model: up\n    startup_time: 500ms\n",
    )
    .unwrap();
    assert_eq!(spec.args, ["--rate", "1.10", "--fast", "true", "a b"]);
    assert_eq!(spec.env["THREADS"], "2");
    assert_eq!(spec.env["ON"], "yes");
    assert_eq!(spec.aliases, ["org/music", "tts-1"]);
    assert_eq!((spec.limit, spec.max_batch, spec.first_batch), (8, 4, 4));
    assert_eq!(spec.timeout, Duration::from_secs(900));
    assert_eq!(spec.idle_ttl, Some(Duration::from_secs(7200)));
    assert_eq!(spec.startup_time, Duration::from_millis(500));
    assert_eq!(spec.memory, Some(18 << 30));
    assert_eq!((spec.gpus, spec.max_attempts, spec.preload), (0, 5, true));
    assert_eq!(spec.model.as_deref(), Some("org/music"));
    assert_eq!(spec.revision.as_deref(), Some("v1"));
    assert_eq!(spec.upstream_model, "up");
    assert_eq!(spec.port, 8007);
}

#[test]
fn a_command_is_a_string_or_a_list() {
    let words = |yaml: &str| match entry_of(yaml) {
        Launch::Command(words) => words,
        launch => panic!("{launch:?}"),
    };
    let expected = ["llama-server", "--port", "{port}", "-c", "a b"];
    assert_eq!(words("llama-server --port {port} -c 'a b'"), expected.map(str::to_owned));
    assert_eq!(words("[llama-server, --port, '{port}', -c, a b]"), expected.map(str::to_owned));
    assert_eq!(
        words("[serve, --ctx, 2048, '{\"json\": 1}']"),
        ["serve", "--ctx", "2048", "{\"json\": 1}"].map(str::to_owned)
    );
}

fn entry_of(command: &str) -> Launch {
    let yaml = format!("models:\n  m:\n    type: text\n    command: {command}\n");
    read(&yaml).unwrap().models[0].launch.clone()
}

#[test]
fn defaults_follow_the_type() {
    let text = entry("    type: text\n").unwrap();
    assert_eq!(text.endpoints, ["/v1/chat/completions", "/v1/completions"]);
    assert_eq!((text.limit, text.max_batch), (256, 1));
    assert_eq!(text.timeout, Duration::from_secs(600));
    assert_eq!(text.startup_time, Duration::from_secs(60));
    let completions = entry("    type: text\n    endpoint: /v1/completions\n").unwrap();
    assert_eq!(completions.endpoints, ["/v1/completions", "/v1/chat/completions"]);
    let audio = entry("    type: audio\n").unwrap();
    assert_eq!(audio.endpoints, ["/v1/audio/generations", "/v1/audio/speech"]);
    assert_eq!((audio.limit, audio.max_batch, audio.first_batch), (16, 16, 16));
    assert_eq!(audio.timeout, Duration::from_secs(900));
    let small = entry("    type: audio\n    limit: 2\n").unwrap();
    assert_eq!((small.limit, small.max_batch), (2, 2));
    let image = entry("    type: image\n    max_batch: 4\n").unwrap();
    assert_eq!((image.limit, image.max_batch, image.first_batch), (4, 4, 4));
    let beside = entry("    type: image\n    limit: 4\n").unwrap();
    assert_eq!((beside.limit, beside.max_batch, beside.first_batch), (4, 1, 1));
    let command = read("models:\n  m:\n    type: image\n    command: x\n").unwrap().models[0].clone();
    assert_eq!((command.limit, command.max_batch, command.first_batch), (1, 1, 1));
    let custom = entry("    type: custom\n    endpoint: /v1/x\n").unwrap();
    assert_eq!(custom.endpoints, ["/v1/x"]);
    let only = entry("    type: text\n    endpoints: [/v1/completions]\n").unwrap();
    assert_eq!(only.endpoints, ["/v1/completions"]);
}

#[test]
fn ports_follow_the_order_of_the_file() {
    let config = read("models:\n  z: {type: text, command: a}\n  a: {type: text, command: a}\n").unwrap();
    let ports: Vec<(&str, u16)> = config.models.iter().map(|m| (m.name.as_str(), m.port)).collect();
    assert_eq!(ports, [("z", 8001), ("a", 8002)]);
}

#[test]
fn a_folder_becomes_absolute_and_an_id_stays() {
    let config = read(
        "models:\n  a: {type: text, command: x, model: ./weights/a}\n  b: {type: text, command: x, model: Qwen/Qwen3-4B}\n  c: {type: text, command: x, model: /abs/c}\n  d: {type: text, command: x, model: .cache/checkpoints/d}\n",
    )
    .unwrap();
    let dir = config.path.parent().unwrap();
    let models: Vec<&str> = config.models.iter().filter_map(|m| m.model.as_deref()).collect();
    assert_eq!(Path::new(models[0]), dir.join("weights/a"));
    assert_eq!(models[1], "Qwen/Qwen3-4B");
    assert_eq!(models[2], "/abs/c");
    assert_eq!(Path::new(models[3]), dir.join(".cache/checkpoints/d"));
}

#[test]
fn an_existing_relative_folder_wins_over_an_id() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::create_dir_all(dir.path().join("org/name")).unwrap();
    let path = dir.path().join("models.yaml");
    std::fs::write(&path, "models:\n  a: {type: text, command: x, model: org/name}\n").unwrap();
    let config = load(&path, &no_env).unwrap();
    let folder = dir.path().join("org/name").display().to_string();
    assert_eq!(config.models[0].model, Some(folder));
}

#[test]
fn python_is_the_entrys_or_the_venvs() {
    let python = |line: &str| {
        let yaml = format!("models:\n  m:\n    type: text\n    service_script: server.py\n{line}");
        let config = read(&yaml).unwrap();
        match config.models[0].launch.clone() {
            Launch::Script { python, .. } => {
                python.strip_prefix(config.path.parent().unwrap()).map(Path::to_path_buf).unwrap_or(python)
            }
            launch => panic!("{launch:?}"),
        }
    };
    assert_eq!(python(""), Path::new(".venv/bin/python"));
    assert_eq!(python("    python: python3\n"), Path::new("python3"));
    assert_eq!(python("    python: envs/a/bin/python\n"), Path::new("envs/a/bin/python"));
}

#[test]
fn unknown_keys_name_line_place_and_neighbour() {
    let error = read(
        "models:\n  flux:\n    type: image\n    servce_script: server.py\n    colour: red\nscheduler:\n  max_wait: {interactve: 5}\nservr: {}\n",
    )
    .unwrap_err();
    let lines: Vec<&str> = error.lines().collect();
    assert_eq!(lines[1], "models.yaml:4: unknown key `servce_script` in models.flux; did you mean `service_script`?");
    assert!(
        lines[2].starts_with("models.yaml:5: unknown key `colour` in models.flux; known keys: type, service_script"),
        "{}",
        lines[2]
    );
    assert_eq!(lines[3], "models.yaml:7: unknown key `interactve` in scheduler.max_wait; did you mean `interactive`?");
    assert_eq!(lines[4], "models.yaml:8: unknown key `servr` in the file; did you mean `server`?");
    assert_eq!(
        lines[0],
        "models.yaml:2: models.flux: needs `service_script` (a server.py) or `command` (any program that serves the endpoint)"
    );
    assert_eq!(lines.len(), 5);
}

#[test]
fn nothing_is_kept_longer_than_the_job_itself() {
    let storage = |settings: &str| {
        let text = format!("models:\n  m: {{type: text, command: x}}\nstorage: {{{settings}}}\n");
        read(&text).map(|config| config.storage)
    };
    let error = storage("results_ttl: 2d, tombstone_ttl: 90m").unwrap_err();
    assert_eq!(
        error,
        "models.yaml:3: storage.results_ttl: 48h is longer than storage.tombstone_ttl (90m), after which the job itself is \
         deleted; raise tombstone_ttl, or lower results_ttl"
    );
    let error = storage("batch_ttl: 60d").unwrap_err();
    assert!(error.contains("storage.batch_ttl: 1440h") && error.contains("(720h, its default)"), "{error}");
    // What is not said follows.
    let short = storage("tombstone_ttl: 1h").unwrap();
    assert_eq!([short.results_ttl, short.sync_ttl, short.batch_ttl], [Duration::from_secs(3_600); 3]);
    assert!(storage("results_ttl: 1h, tombstone_ttl: 1h").is_ok());
}

#[test]
fn a_section_that_is_no_map_is_refused_with_what_it_should_be() {
    for section in ["storage", "server", "scheduler"] {
        let error = read(&format!("models:\n  m: {{type: text, command: x}}\n{section}: 5\n")).unwrap_err();
        assert!(error.contains(&format!("models.yaml:3: {section}: ")) && error.contains("must be a map"), "{error}");
        assert_eq!(error.lines().count(), 1, "{error}");
    }
}

#[test]
fn an_empty_section_is_one_without_settings() {
    assert!(read("models:\n  m: {type: text, command: x}\nstorage:\nserver: ~\n").is_ok());
}

#[test]
fn a_model_is_parked_in_host_memory_if_it_says_so() {
    assert_eq!(entry("    type: text\n").unwrap().park, Park::Off, "its worker has to know how");
    for (word, park) in [("off", Park::Off), ("ram", Park::Ram), ("checkpoint", Park::Checkpoint)] {
        assert_eq!(entry(&format!("    type: text\n    park: {word}\n")).unwrap().park, park);
    }
    let error = entry("    type: text\n    park: disk\n").unwrap_err();
    assert!(error.starts_with("models.yaml:5: models.m.park: ") && error.contains("ram"), "{error}");
    assert!(!entry("    type: text\n").unwrap().spare);
    let error = entry("    type: text\n    spare: true\n").unwrap_err();
    assert!(error.starts_with("models.yaml:5: models.m.spare: goes with `service_script`"), "{error}");
    let error = entry("    type: text\n    gpus: 0\n    park: ram\n").unwrap_err();
    assert!(error.starts_with("models.yaml:6: models.m.park: a model on the CPU"), "{error}");
}

#[test]
fn room_for_parked_models_is_a_size_or_a_share() {
    let room = |value: &str| {
        let yaml = format!("models:\n  m: {{type: text, command: x}}\nscheduler:\n  park_ram: {value}\n");
        read(&yaml).map(|config| config.scheduler.park_ram)
    };
    let of_10_gib = |value: &str| room(value).unwrap().of(10 << 30);
    assert_eq!(of_10_gib("50%"), 5 << 30);
    assert_eq!(of_10_gib("0.5"), 5 << 30);
    assert_eq!(of_10_gib("3GiB"), 3 << 30);
    assert_eq!(of_10_gib("0"), 0);
    assert_eq!(Knobs::default().park_ram.of(10 << 30), 6 << 30);
    assert_eq!(Knobs::default().park_ram.of(u64::MAX), 0, "of nobody knows how much");
    let error = room("120%").unwrap_err();
    assert_eq!(error, "models.yaml:4: scheduler.park_ram: must be at most 100%; write 60% or 64GiB");
}

#[test]
fn a_model_may_have_several_workers() {
    let replicas = |value: &str| entry(&format!("    type: text\n    max_replicas: {value}\n"));
    assert_eq!(entry("    type: text\n").unwrap().max_replicas, 1);
    assert_eq!(replicas("4").unwrap().max_replicas, 4);
    for (wrong, what) in [("0", "must be at least 1"), ("65", "65 is too many; take one of 1-64")] {
        assert_eq!(replicas(wrong).unwrap_err(), format!("models.yaml:5: models.m.max_replicas: {what}"));
    }
}

#[test]
fn models_can_be_pinned_and_tenants_weighed() {
    let spec = entry("    type: text\n    pin: true\n    exclusive: true\n").unwrap();
    assert!(spec.pin && spec.exclusive);
    let spec = entry("    type: text\n").unwrap();
    assert!(!spec.pin && !spec.exclusive);
    let file = |tenants: &str| read(&format!("models:\n  m: {{type: text, command: x}}\ntenants:\n{tenants}"));
    let config = file("  alice: {weight: 2}\n  bob: {}\n").unwrap();
    assert_eq!(config.weights.into_iter().collect::<Vec<_>>(), [("alice".to_owned(), 2.0)]);
    for wrong in ["0", "-1"] {
        let error = file(&format!("  alice: {{weight: {wrong}}}\n")).unwrap_err();
        assert_eq!(error, "models.yaml:4: tenants.alice.weight: must be a number more than 0");
    }
}

#[test]
fn keys_that_stand_twice() {
    let error = read(
        "models:\n  m: {type: text, command: x}\n  n:\n    type: text\n    command: x\n    type: image\n  m: {type: text, command: z}\n",
    )
    .unwrap_err();
    assert_eq!(
        error,
        "models.yaml:6: `type` stands twice in models.n, first on line 4; remove one\nmodels.yaml:7: `m` stands twice in models, first on line 2; remove one"
    );
}

/// What each slip says; the first line of the entry is line 4.
#[test]
fn values_that_make_no_sense() {
    for (settings, expected) in [
        ("    type: txt\n", "4: models.m.type: unknown variant `txt`"),
        ("    port: 8001\n", "2: models.m: `type` is missing"),
        ("    type: text\n    port: 80\n", "5: models.m.port: 80 is out of range; take one of 1024-65535"),
        ("    type: text\n    port: 99999\n", "5: models.m.port: "),
        ("    type: text\n    port: abc\n", "5: models.m.port: "),
        ("    type: text\n    limit: 0\n", "5: models.m.limit: must be at least 1"),
        ("    type: text\n    limit: -1\n", "5: models.m.limit: "),
        ("    type: text\n    endpoint: v1/chat\n", "5: models.m.endpoint: `v1/chat` is no path"),
        ("    type: text\n    timeout: 15x\n", "5: models.m.timeout: `15x` is no duration"),
        ("    type: text\n    timeout: 0\n", "5: models.m.timeout: must be more than 0"),
        ("    type: text\n    memory: 18G\n", "5: models.m.memory: `18G` is no size"),
        ("    type: text\n    max_batch: 4\n", "5: models.m.max_batch: text engines batch by themselves"),
        ("    type: image\n    max_batch: 4\n    limit: 2\n", "5: models.m.max_batch: 4 is more than `limit` (2)"),
        ("    type: custom\n", "2: models.m: needs an `endpoint`"),
        ("    type: text\n    args: ['--x={modle}']\n", "5: models.m.args: `{modle}` is no placeholder"),
        ("    type: text\n    args: ['{model}']\n", "5: models.m.args: has {model}, but the entry has no `model`"),
        (
            "    type: text\n    args: ['{revision}']\n",
            "5: models.m.args: has {revision}, but the entry has no `revision`",
        ),
        (
            "    type: text\n    service_script: server.py\n",
            "5: models.m: `service_script` and `command` are both given",
        ),
        ("    type: text\n    python: python3\n", "5: models.m.python: goes with `service_script`"),
        ("    type: text\n    aliases: [m]\n", "5: models.m.aliases: `m` is already the name of models.m"),
        ("    type: text\n    aliases: [a, a]\n", "5: models.m.aliases: `a` is already an alias of models.m"),
        ("    type: text\n    aliases: ['a b']\n", "5: models.m.aliases: `a b` is no alias"),
        ("    type: text\n    args: --x\n", "5: models.m.args: "),
    ] {
        let error = entry(settings).unwrap_err();
        let expected = format!("models.yaml:{expected}");
        assert!(error.starts_with(&expected), "{settings}: {error}");
        assert_eq!(error.lines().count(), 1, "{settings}: {error}");
    }
}

#[test]
fn weights_that_make_no_sense() {
    let of = |launch: &str, settings: &str| {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("server.py"), "").unwrap();
        std::fs::create_dir(dir.path().join("weights")).unwrap();
        let yaml = format!("models:\n  m:\n    type: image\n    {launch}\n{settings}");
        std::fs::write(dir.path().join("models.yaml"), yaml).unwrap();
        load(&dir.path().join("models.yaml"), &|_| None).map(drop).map_err(|error| error.to_string())
    };
    let script = "service_script: server.py";
    for (launch, settings, expected) in [
        (script, "    revision: v1\n", "m.revision: goes with `model`"),
        (script, "    model: ./weights\n    revision: v1\n", "m.revision: goes with a `model` from the hub"),
        (script, "    model: weights\n    revision: v1\n", "m.revision: goes with a `model` from the hub"),
        (script, "    model: org/m\n    revision: ../../etc\n", "m.revision: `../../etc` is no revision"),
        (
            script,
            "    model: https://huggingface.co/org/m\n",
            "m.model: `https://huggingface.co/org/m` is no Hugging Face id",
        ),
        (script, "    model: org/na me\n", "m.model: `org/na me` is no Hugging Face id"),
        (script, "    park: ram\n    memory: 0GiB\n", "m.memory: is 0, so there is nothing to park"),
    ] {
        let error = of(launch, settings).unwrap_err();
        assert!(error.contains(expected) && error.lines().count() == 1, "{settings}: {error}");
    }
    for fine in
        ["    model: org/m\n    revision: refs/pr/1\n", "    model: ./not here/yet\n", "    model: some/deep/folder\n"]
    {
        assert_eq!(of(script, fine), Ok(()), "{fine}");
    }
}

#[test]
fn commands_and_scripts_that_make_no_sense() {
    let of = |settings: &str| read(&format!("models:\n  m:\n    type: text\n    {settings}\n")).unwrap_err();
    assert!(of("command: ''").starts_with("models.yaml:4: models.m.command: is empty"));
    assert!(of("command: []").starts_with("models.yaml:4: models.m.command: is empty"));
    let quotes = of("command: a 'b");
    assert!(quotes.starts_with("models.yaml:4: models.m.command: the quotes"), "{quotes}");
    assert!(of("command: a --port {prt}").starts_with("models.yaml:4: models.m.command: `{prt}` is no placeholder"));
    assert_eq!(of("service_script: sever.py"), "models.yaml:4: models.m.service_script: there is no file sever.py");
}

#[test]
fn args_of_a_script_are_not_filled_in() {
    let of = |args: &str| {
        read(&format!("models:\n  m:\n    type: text\n    service_script: server.py\n    args: ['{args}']\n"))
    };
    let error = of("--url=localhost:{port}").unwrap_err();
    assert!(error.starts_with("models.yaml:5: models.m.args: `{port}` is filled in only with `command`"), "{error}");
    assert_eq!(of("--template={prompt}").unwrap().models[0].args, ["--template={prompt}"]);
}

#[test]
fn names_that_cannot_be_served() {
    for name in ["a/b", "'a b'", "-a", "''"] {
        let error = read(&format!("models:\n  {name}: {{type: text, command: x}}\n")).unwrap_err();
        assert!(error.contains("a name is 1-128"), "{name}: {error}");
        assert!(error.starts_with("models.yaml:2: "), "{error}");
    }
}

#[test]
fn all_problems_come_at_once_in_order() {
    let error = read(
        "models:\n  a:\n    type: text\n    port: 1\n  b:\n    command: x\n    limit: 0\n    tpye: text\nserver:\n  listen: nowhere\n",
    )
    .unwrap_err();
    let lines: Vec<&str> = error.lines().filter_map(|line| line.split(':').nth(1)).collect();
    assert_eq!(lines, ["2", "4", "5", "7", "8", "10"]);
}

#[test]
fn what_is_no_yaml_has_a_line() {
    let error = read("models:\n  a: [1, 2\n  b: {\n").unwrap_err();
    assert!(error.starts_with("models.yaml:"), "{error}");
    let line: usize = error.split(':').nth(1).unwrap().parse().unwrap();
    assert!((2..=4).contains(&line), "{error}");
    for empty in ["", "models: {}\n", "models:\n"] {
        let error = read(empty).unwrap_err();
        assert!(error.ends_with("`models` has no entry; docs/ADDING_MODELS.md shows one"), "{error}");
    }
    let error = read("- a\n- b\n").unwrap_err();
    assert!(error.starts_with("models.yaml:1: "), "{error}");
}

#[test]
fn a_missing_file_says_how_to_name_another() {
    let error = load(Path::new("/nowhere/models.yaml"), &no_env).unwrap_err();
    assert!(error.to_string().contains("--config"), "{error}");
}

#[test]
fn the_scheduler_section() {
    let yaml = "models:\n  m: {type: text, command: x}\nscheduler:\n  max_wait: {interactive: 20s, batch: 30m}\n  max_visit: 2m\n  swap_budget: {interactive: 40%, other: 0.1}\n  queued_max: 10\n  queued_per_tenant_max: 5\n  waiting_sync_max: 3\n";
    let knobs = read(yaml).unwrap().scheduler;
    assert_eq!(knobs.max_wait_interactive, Duration::from_secs(20));
    assert_eq!(knobs.max_wait_batch, Duration::from_secs(1800));
    assert_eq!(knobs.max_visit, Duration::from_secs(120));
    assert_eq!((knobs.swap_budget_interactive, knobs.swap_budget_other), (0.4, 0.1));
    assert_eq!((knobs.queued_max, knobs.queued_per_tenant_max, knobs.waiting_sync_max), (10, 5, 3));
    let bad = read(&yaml.replace("40%", "100%").replace("30m", "0")).unwrap_err();
    assert_eq!(
        bad,
        "models.yaml:4: scheduler.max_wait.batch: must be more than 0\nmodels.yaml:6: scheduler.swap_budget.interactive: must lie between 0 and 1, as 0.5 or 50% do"
    );
}

const SERVER: &str = "models:\n  m: {type: text, command: x}\nserver:\n  listen: 0.0.0.0:9100\n";

#[test]
fn the_server_section() {
    let yaml = format!(
        "{SERVER}  public_url: https://example.org/rh/\n  sync_hop: 5\n  sync_max_hops: 2\n  hop_grace: 1s\n  disconnect_grace: 100ms\n  body_bytes_max: 1MiB\n  worker_grace: 3\n  load_limit: 20m\n  backoff_first: 1\n  backoff_max: 4\n  shutdown_grace: 7\n"
    );
    let server = read(&yaml).unwrap().server;
    assert_eq!(server.listen.as_deref(), Some("0.0.0.0:9100"));
    assert_eq!(server.public_url.as_deref(), Some("https://example.org/rh"));
    assert_eq!((server.sync_max_hops, server.body_bytes_max), (2, 1 << 20));
    assert_eq!(server.disconnect_grace, Duration::from_millis(100));
    assert_eq!(server.backoff_max, Duration::from_secs(4));
    assert_eq!(server.load_limit, Duration::from_secs(1200));
    assert_eq!(server.shutdown_grace, Duration::from_secs(7));
    let bad = read(&yaml.replace("backoff_max: 4", "backoff_max: 0.5")).unwrap_err();
    assert!(bad.contains("server.backoff_max: must not be less"), "{bad}");
}

#[test]
fn the_environment_wins_over_the_file() {
    let yaml = format!("{SERVER}  public_url: https://file\n");
    let server = read_with(&yaml, &|name| match name {
        "ROUNDHOUSE_LISTEN" => Some("127.0.0.1:9200".into()),
        "ROUNDHOUSE_PUBLIC_URL" => Some("https://env".into()),
        _ => None,
    })
    .unwrap()
    .server;
    assert_eq!(server.listen.as_deref(), Some("127.0.0.1:9200"));
    assert_eq!(server.public_url.as_deref(), Some("https://env"));
    let error = read_with(SERVER, &|name| (name == "ROUNDHOUSE_LISTEN").then(|| "9200".into()));
    let error = error.unwrap_err();
    assert!(error.starts_with("--listen or ROUNDHOUSE_LISTEN: `9200` is no address"), "not the file's fault: {error}");
    let error = read_with(SERVER, &|name| (name == "ROUNDHOUSE_PUBLIC_URL").then(|| "host".into())).unwrap_err();
    assert!(error.starts_with("ROUNDHOUSE_PUBLIC_URL: `host` is no address"), "{error}");
}

#[test]
fn a_pod_is_reached_through_its_proxy() {
    let pod = |name: &str| (name == "RUNPOD_POD_ID").then(|| "abc123".to_owned());
    let server = read_with(SERVER, &pod).unwrap().server;
    assert_eq!(server.public_url.as_deref(), Some("https://abc123-9100.proxy.runpod.net"));
    assert_eq!(read(SERVER).unwrap().server.public_url, None);
}

#[test]
fn hub_ids() {
    for id in ["org/name", "gpt2", "Qwen/Qwen3-4B-Instruct-2507"] {
        assert!(is_hub_id(id), "{id}");
    }
    for folder in ["/abs", "./a", "../a", ".cache/a/b", "a/b/c", "", "a/"] {
        assert!(!is_hub_id(folder), "{folder}");
    }
}

#[test]
fn a_name_without_a_value_passes_the_servers_own_on() {
    let own = |name: &str| (name == "MY_TOKEN").then(|| "of the server".to_owned());
    let yaml = "models:\n  m:\n    type: text\n    command: x\n    env: {MY_TOKEN: , NOT_SET: null, EMPTY: ''}\n";
    let config = read_with(yaml, &own).unwrap();
    let env: Vec<(&str, &str)> =
        config.models[0].env.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
    assert_eq!(env, [("EMPTY", ""), ("MY_TOKEN", "of the server")]);
}

#[test]
fn debug_hides_the_environments_values() {
    let spec = entry("    type: text\n    env: {TOKEN: hunter2}\n").unwrap();
    let text = format!("{spec:?}");
    assert!(text.contains("TOKEN") && !text.contains("hunter2"), "{text}");
}

#[test]
fn the_schema_knows_all_keys_and_describes_them() {
    let schema: serde_json::Value = serde_json::from_str(&schema()).unwrap();
    let entry = schema.pointer("/$defs/Entry/properties").unwrap();
    for key in ["type", "service_script", "command", "memory", "upstream_model"] {
        assert!(entry[key]["description"].is_string(), "{key}");
    }
    assert_eq!(schema.pointer("/$defs/Entry/additionalProperties"), Some(&serde_json::Value::Bool(false)));
}

#[test]
fn a_gpu_may_have_a_price() {
    let dir = tempfile::tempdir().unwrap();
    let of = |cost: &str| {
        let path = dir.path().join("models.yaml");
        let yaml = format!("models:\n  m: {{type: text, command: x}}\nscheduler:\n  gpu_hourly_cost: {cost}\n");
        std::fs::write(&path, yaml).unwrap();
        load(&path, &|_| None)
    };
    assert_eq!(of("2.49").unwrap().gpu_hourly_cost, Some(2.49));
    let error = of("-1").unwrap_err().to_string();
    assert!(error.contains("scheduler.gpu_hourly_cost: must be a number, 0 or more"), "{error}");
}
