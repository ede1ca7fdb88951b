//! Cold starts: where their time goes, and spare processes that have imported everything before a load wants them.

use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::sys::signal::Signal;
use serde_json::{Value, json};

use crate::common::{Api, LIMIT, Server, Site, echo, eventually, python, with};
use crate::parking::visit;

/// An echo worker by `service_script`, which may have a spare process. Its imports take a while.
fn scripted(more: Value) -> Value {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut entry = with(echo::<&str>("custom", &[]), json!({"service_script": root.join("models/echo/server.py")}));
    entry.as_object_mut().unwrap().remove("command");
    let usual = json!({"python": python(root), "gpus": 1, "memory": "50GiB", "spare": true, "max_attempts": 1,
        "env": {"ECHO_IMPORT_MS": "50"}});
    with(with(entry, usual), more)
}

fn site() -> Site {
    Site::new().env("ROUNDHOUSE_FAKE_GPUS", "2x80GiB")
}

async fn spares(api: &Api) -> Vec<Value> {
    api.get("/v1/workers").await.is(200).json()["spares"].as_array().unwrap().clone()
}

/// The only spare process, once `is` holds of it.
async fn spare_when(api: &Api, what: &str, is: impl Fn(&Value) -> bool) -> Value {
    eventually(LIMIT, what, || async {
        let all = spares(api).await;
        assert_eq!(all.len(), 1, "{all:?}");
        all.into_iter().next().filter(|spare| is(spare))
    })
    .await
}

async fn ready_spare(api: &Api) -> Value {
    spare_when(api, "a spare process is ready", |spare| spare["state"] == "ready").await
}

/// Sends a signal to the Python process of the spare.
fn signal_spare(server: &Server, signal: Signal) {
    let all = server.processes().into_iter();
    let mut spares = all.filter(|found| found.is_worker() && found.command.iter().any(|word| word == "--spare"));
    spares.next().unwrap().signal(signal);
}

#[tokio::test]
async fn the_phases_of_a_cold_start_are_told_everywhere() {
    let server = Site::new().model("a", echo("custom", &["--import-ms", "30", "--load-s", "0.1"])).start().await;
    let api = &server.api;
    let id = api.submit_echo("a", json!({})).await;
    api.succeeded(&id).await;
    let worker = api.worker("a").await;
    let told = eventually(LIMIT, "its job was told", || async {
        let events = api.events(&id).await;
        events.into_iter().find(|event| event["type"] == "job.loading" && event.get("phases").is_some())
    })
    .await;
    for phases in [&worker["phases"], &told["phases"]] {
        let phases = phases.as_array().unwrap();
        let names: Vec<&str> = phases.iter().map(|phase| phase["phase"].as_str().unwrap()).collect();
        assert_eq!(names, ["spawn", "import", "read"]);
        let ms = |at: usize| phases[at]["ms"].as_i64().unwrap();
        assert!(ms(0) > 0 && ms(1) >= 30 && ms(2) >= 100, "{phases:?}");
    }
    assert_eq!(told["model"], "a");
    let metrics = api.get("/metrics").await.is(200).text();
    assert!(metrics.contains("roundhouse_load_phase_seconds_count{model=\"a\",phase=\"read\"} 1\n"), "{metrics}");
    assert!(server.log().contains("phases=\"spawn "), "{}", server.log());
}

#[tokio::test]
async fn a_load_takes_the_spare_process_of_its_environment_over() {
    let site = site().model("a", scripted(json!({"args": ["--park-s", "0"]}))).model("b", scripted(json!({})));
    let mut server = site.start().await;
    let api = server.api.clone();
    let spare = ready_spare(&api).await;
    assert_eq!(spare["models"], json!(["a", "b"]), "they share it");
    assert!(spare["host_bytes"].as_u64().unwrap() > 1 << 20, "{spare}");
    let job = visit(&api, "a").await;
    assert_eq!(job["result"]["body"]["gpus"], "0", "its GPU was chosen when it was taken");
    let worker = api.worker("a").await;
    assert_eq!((&worker["pid"], &worker["port"]), (&spare["pid"], &spare["port"]));
    let imported = worker["phases"][1].clone();
    assert_eq!(imported["phase"], "import");
    assert!(imported["ms"].as_i64().unwrap() < 50, "it had imported: {imported}");
    // The next one is for the next load.
    let next = ready_spare(&api).await;
    assert_ne!(next["pid"], spare["pid"]);
    assert_eq!((&next["taken"], &next["starts"]), (&json!(1), &json!(2)));
    let job = visit(&api, "b").await;
    assert_eq!(job["result"]["body"]["gpus"], "1");
    assert_eq!(api.worker("b").await["pid"], next["pid"]);
    assert!(server.worker_log("a").contains("pass finished"), "its log goes on in that of its model");
    ready_spare(&api).await;
    server.signal(Signal::SIGTERM);
    assert!(server.ended().await.success());
    server.all_gone(Duration::from_secs(5)).await;
}

#[tokio::test]
async fn a_spare_process_that_dies_or_hangs_costs_a_cold_start() {
    let server = site().model("a", scripted(json!({}))).start().await;
    let api = &server.api;
    ready_spare(api).await;
    signal_spare(&server, Signal::SIGKILL);
    let again = spare_when(api, "another one", |spare| spare["state"] == "ready" && spare["starts"] == 2).await;
    assert!(server.log().contains("no spare process"), "{}", server.log());
    // It lives and does not answer.
    signal_spare(&server, Signal::SIGSTOP);
    visit(api, "a").await;
    let worker = api.worker("a").await;
    assert_ne!(worker["pid"], again["pid"]);
    assert_eq!(worker["failed_loads"], 0, "that is no failed load");
    assert!(server.log().contains("no answer to /take_over"), "{}", server.log());
    let last = spare_when(api, "a third one", |spare| spare["state"] == "ready" && spare["starts"] == 3).await;
    assert_eq!(last["reason"], Value::Null);
}

#[tokio::test]
async fn a_load_that_fails_in_a_former_spare_says_why() {
    let server = site().model("a", scripted(json!({"args": ["--load-fail", "no such weights"]}))).start().await;
    let api = &server.api;
    let spare = ready_spare(api).await;
    api.submit_echo("a", json!({})).await;
    let reason = eventually(LIMIT, "the load has failed", || async {
        api.worker("a").await["reason"].as_str().map(str::to_owned)
    })
    .await;
    assert_eq!(reason.matches("no such weights").count(), 1, "it is told and logged, and said once: {reason}");
    assert_eq!(spare_when(api, "it was taken", |spare| spare["taken"] != 0).await["models"], spare["models"]);
    // Each try begins a log of its own.
    eventually(LIMIT, "its log says it, too", || async {
        server.worker_log("a").contains("no such weights").then_some(())
    })
    .await;
}

/// A copy of echo's script, which a test may edit.
fn own_script(site: &Site) -> PathBuf {
    let models = Path::new(env!("CARGO_MANIFEST_DIR")).join("models");
    let script = site.path().join("models/mine/server.py");
    std::fs::create_dir_all(script.parent().unwrap()).unwrap();
    std::fs::copy(models.join("echo/server.py"), &script).unwrap();
    std::os::unix::fs::symlink(models.join("base"), site.path().join("models/base")).unwrap();
    script
}

#[tokio::test]
async fn a_spare_whose_code_has_been_edited_is_replaced() {
    let site = site();
    let script = own_script(&site);
    let server = site.model("a", scripted(json!({"service_script": script}))).start().await;
    let api = &server.api;
    let before = ready_spare(api).await;
    let text = std::fs::read_to_string(&script).unwrap();
    std::fs::write(&script, format!("{text}# edited\n")).unwrap();
    visit(api, "a").await;
    let after =
        spare_when(api, "another one is ready", |spare| spare["state"] == "ready" && spare["pid"] != before["pid"])
            .await;
    assert_eq!(after["taken"], 0, "the load began from nothing");
}

#[tokio::test]
async fn a_spare_whose_code_has_been_edited_and_that_is_slow_to_end_keeps_no_load_waiting() {
    // Longer than anything is waited for here.
    let site = site().server("worker_grace", "10min");
    let script = own_script(&site);
    let text = std::fs::read_to_string(&script).unwrap();
    let deaf = "\nimport signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\nsignal.signal = lambda *_: None\n";
    std::fs::write(&script, text.replace("\nimport signal\n", deaf)).unwrap();
    let entry = || scripted(json!({"service_script": script, "memory": "30GiB"}));
    let server = site.model("a", entry()).model("b", entry()).start().await;
    let api = &server.api;
    let before = ready_spare(api).await;
    std::fs::write(&script, text).unwrap();
    visit(api, "a").await;
    visit(api, "b").await;
    let is_new = |spare: &Value| spare["state"] == "ready" && spare["pid"] != before["pid"];
    spare_when(api, "another one is ready", is_new).await;
}

#[tokio::test]
async fn imports_that_fail_leave_cold_starts_as_they_are() {
    let entry = scripted(json!({"env": {"ECHO_IMPORT_MS": "no number"}}));
    let server = site().model("a", entry).start().await;
    let api = &server.api;
    let failed = spare_when(api, "it has failed", |spare| spare["state"] == "backoff").await;
    assert!(failed["reason"].as_str().unwrap().contains("no number"), "{failed}");
    visit(api, "a").await;
    spare_when(api, "it is tried again", |spare| spare["starts"].as_u64() > Some(1)).await;
}

/// Appended to a server of ours: its imports wait for the file `go`, and then come to nothing. The file `asked` says that
/// somebody has had an answer, and asks again.
const FAILING_IMPORTS: &str = r#"
def preload(cls):
    folder = Path(__file__).parent
    while not (folder / "go").exists():
        time.sleep(0.01)
    if os.environ["HOW"] == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    raise ImportError("no such wheel")

class Asked(rw.spare.Spare):
    times = 0

    async def health(self, request):
        self.times += 1
        if self.times > 1:
            Path(__file__).with_name("asked").touch()
        return await super().health(request)

EchoService.preload, rw.spare.Spare = classmethod(preload), Asked
"#;

#[tokio::test]
async fn a_spare_that_fails_in_its_imports_after_a_load_took_it_costs_a_cold_start() {
    for (how, said) in [("raises", "it says: ImportError: no such wheel"), ("killed", "it was killed by SIGKILL")] {
        let site = site();
        let models = Path::new(env!("CARGO_MANIFEST_DIR")).join("models");
        let script = site.path().join("models/mine/server.py");
        std::fs::create_dir_all(script.parent().unwrap()).unwrap();
        std::os::unix::fs::symlink(models.join("base"), site.path().join("models/base")).unwrap();
        let main = "\n\nif __name__ == \"__main__\":";
        let text = std::fs::read_to_string(models.join("echo/server.py")).unwrap();
        let (text, end) = text.split_once(main).unwrap();
        std::fs::write(&script, format!("{text}\nimport roundhouse_worker.spare\n{FAILING_IMPORTS}{main}{end}"))
            .unwrap();
        let server = site.model("a", scripted(json!({"service_script": script, "env": {"HOW": how}}))).start().await;
        let api = &server.api;
        let spare = spare_when(api, "it imports", |spare| {
            spare["state"] == "importing" && script.with_file_name("asked").exists()
        })
        .await;
        let id = api.submit_echo("a", json!({})).await;
        eventually(LIMIT, "a load has it", || async { (api.worker("a").await["pid"] == spare["pid"]).then_some(()) })
            .await;
        std::fs::write(script.with_file_name("go"), "").unwrap();
        api.succeeded(&id).await;
        let worker = api.worker("a").await;
        assert_eq!((&worker["starts"], &worker["last_failure"]), (&json!(2), &Value::Null));
        let log = server.log();
        assert!(!log.contains("does not load"), "that is no failed load: {log}");
        assert!(log.contains("has failed to import, so it is loaded from nothing") && log.contains(said), "{log}");
        let failed = spare_when(api, "it is not there", |spare| spare["state"] == "backoff").await;
        assert!(failed["reason"].as_str().unwrap().contains(said), "{failed}");
    }
}

#[tokio::test]
async fn a_killed_server_leaves_no_spare_process_behind() {
    let site = site().model("a", scripted(json!({})));
    let mut server = site.start().await;
    ready_spare(&server.api).await;
    server.kill();
    server.all_gone(Duration::from_secs(15)).await;
}

#[tokio::test]
async fn a_spare_process_knows_the_only_gpu_from_its_start() {
    for (gpus, visible) in [("1x80GiB", Some("CUDA_VISIBLE_DEVICES=0")), ("2x80GiB", None)] {
        let server = site().env("ROUNDHOUSE_FAKE_GPUS", gpus).model("a", scripted(json!({}))).start().await;
        ready_spare(&server.api).await;
        let all = server.processes().into_iter();
        let mut spares = all.filter(|found| found.is_worker() && found.command.iter().any(|word| word == "--spare"));
        let environ = std::fs::read(format!("/proc/{}/environ", spares.next().unwrap().pid)).unwrap();
        let environ = String::from_utf8(environ).unwrap();
        let found = environ.split('\0').find(|variable| variable.starts_with("CUDA_VISIBLE_DEVICES="));
        assert_eq!(found, visible, "{gpus}");
    }
}

#[tokio::test]
async fn an_edit_of_the_models_starts_and_ends_spare_processes_and_touches_no_worker() {
    let spared = scripted(json!({}));
    let plain = with(spared.clone(), json!({"spare": false}));
    let site = site().model("a", plain.clone());
    let server = site.start().await;
    visit(&server.api, "a").await;
    assert_eq!(spares(&server.api).await, [json!(null); 0]);
    let site = site.model("a", spared);
    site.write();
    eventually(LIMIT, "a spare process is ready", || async {
        spares(&server.api).await.first().filter(|spare| spare["state"] == "ready").map(|_| ())
    })
    .await;
    assert_eq!(spares(&server.api).await[0]["models"], json!(["a"]));
    let is_spare = |found: &crate::common::Proc| found.command.iter().any(|word| word == "--spare");
    let site = site.model("a", plain);
    site.write();
    eventually(LIMIT, "it is gone", || async { (!server.processes().iter().any(is_spare)).then_some(()) }).await;
    assert_eq!(spares(&server.api).await, [json!(null); 0]);
    assert_eq!(server.api.worker("a").await["starts"], 1);
    assert_eq!(server.api.worker("a").await["state"], "resident");
}
