//! Tries docs/ADDING_MODELS.md: its entries are read by the program, its server.py is run and asked.

#![expect(clippy::unwrap_used, reason = "a test may panic, in its helpers too")]

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use roundhouse::config::{self, Config};
use roundhouse::domain::Launch;

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

/// The blocks of a language in the page, in order.
fn blocks(language: &str) -> Vec<String> {
    let page = std::fs::read_to_string(root().join("docs/ADDING_MODELS.md")).unwrap();
    let fence = format!("```{language}\n");
    let parts = page.split(&fence).skip(1);
    parts.map(|part| part.split("```").next().unwrap().to_owned()).collect()
}

/// A folder laid out as the page says, with the given block as its models.yaml.
fn laid_out(yaml: &str) -> (tempfile::TempDir, Config) {
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path().join("models/tone");
    std::fs::create_dir_all(&folder).unwrap();
    std::fs::write(folder.join("server.py"), &blocks("python")[0]).unwrap();
    let path = dir.path().join("models.yaml");
    std::fs::write(&path, yaml).unwrap();
    let config = config::load(&path, &|_| None).unwrap_or_else(|error| panic!("{error}"));
    (dir, config)
}

#[test]
fn the_entries_are_read() {
    let yaml = blocks("yaml");
    let names: Vec<Vec<String>> =
        yaml.iter().map(|yaml| laid_out(yaml).1.models.iter().map(|spec| spec.name.clone()).collect()).collect();
    assert_eq!(names, [vec!["tone"], vec!["llama", "smol", "coder", "rerank"]]);
    let Launch::Command(words) = laid_out(&yaml[1]).1.models[0].launch.clone() else { panic!() };
    assert_eq!(words[..3], ["llama-server", "-m", "/models/some.gguf"]);
    // What the page serves a model with is what the test with real engines does.
    let Launch::Command(words) = laid_out(&yaml[1]).1.models[1].launch.clone() else { panic!() };
    let tried = std::fs::read_to_string(root().join("tests/engines/test_0_llamacpp.py")).unwrap();
    assert!(words[2].contains("xllamacpp.Server") && tried.contains(words[2].trim()), "{words:?}");
}

/// A Python with what the base service needs: ROUNDHOUSE_TEST_PYTHON, else the tests' environment, else the system's.
fn python() -> Option<PathBuf> {
    if let Some(python) = std::env::var_os("ROUNDHOUSE_TEST_PYTHON") {
        return Some(PathBuf::from(python));
    }
    let fits = |python: &Path| {
        let mut command = Command::new(python);
        command.args(["-c", "import starlette, uvicorn"]).stderr(Stdio::null());
        command.status().is_ok_and(|status| status.success())
    };
    let places = [root().join(".venv-dev/bin/python"), PathBuf::from("python3")];
    places.into_iter().find(|python| fits(python))
}

/// Killed at the end of its test.
struct Worker(Child);

impl Drop for Worker {
    fn drop(&mut self) {
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

fn worker(config: &Config, python: &Path, port: &str, more: &[&str]) -> Command {
    let spec = &config.models[0];
    let Launch::Script { script, .. } = &spec.launch else { panic!("{}", spec.name) };
    let mut command = Command::new(python);
    command.arg(script).args(["--name", &spec.name, "--port", port]).args(&spec.args).args(more);
    command.env("PYTHONPATH", root().join("models/base")).env("PYTHONDONTWRITEBYTECODE", "1");
    command
}

#[tokio::test]
async fn the_example_runs_and_answers() {
    let python = python().expect("no Python with starlette and uvicorn: scripts/test-python.sh makes one");
    let (_dir, config) = laid_out(&blocks("yaml")[0]);
    let check = worker(&config, &python, "0", &["--check"]).output().unwrap();
    let text = String::from_utf8_lossy(&check.stdout);
    assert!(
        check.status.success() && text.contains("\"ok\": true"),
        "{text} {}",
        String::from_utf8_lossy(&check.stderr)
    );

    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let mut process = Worker(worker(&config, &python, &port.to_string(), &[]).spawn().unwrap());
    let base = format!("http://127.0.0.1:{port}");
    let http = reqwest::Client::builder().no_proxy().build().unwrap();
    for _ in 0..1200 {
        if http.get(format!("{base}/health")).send().await.is_ok_and(|answer| answer.status() == 200) {
            break;
        }
        assert!(process.0.try_wait().unwrap().is_none(), "the worker ended; its lines above say why");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }

    let ask = |body: serde_json::Value| http.post(format!("{base}/v1/audio/generations")).json(&body).send();
    let answer = ask(serde_json::json!({"prompt": "A4", "duration": 0.5})).await.unwrap();
    assert_eq!(answer.status(), 200);
    assert_eq!(answer.headers()["content-type"], "audio/wav");
    let wav = answer.bytes().await.unwrap();
    assert!(wav.starts_with(b"RIFF"));
    assert_eq!(wav.len(), 44 + 2 * 4000, "half a second at the entry's rate");
    let samples: Vec<i16> = wav[44..].chunks(2).map(|pair| i16::from_le_bytes([pair[0], pair[1]])).collect();
    let rises = samples.windows(2).filter(|pair| pair[0] < 0 && pair[1] >= 0).count();
    assert!((219..=220).contains(&rises), "440 Hz for half a second rises about 220 times, not {rises}");

    let refused = ask(serde_json::json!({"prompt": "H9"})).await.unwrap();
    assert_eq!(refused.status(), 400);
    assert!(refused.text().await.unwrap().contains("prompt must be one of"));
}
