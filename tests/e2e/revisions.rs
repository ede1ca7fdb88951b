//! A pinned revision reaches the worker: it loads the snapshot that its entry names, whatever `main` is.

use std::path::Path;

use serde_json::json;

use crate::common::{Site, python};

/// Says what is in the weights that it finds.
const SERVER: &str = r#"
from roundhouse_worker import BaseService, weights


class Reader(BaseService):
    endpoints = ("/v1/read",)

    def initialize(self, loading):
        folder = weights.local_folder(self.options.model, self.options.revision)
        self.text = (folder / "model.safetensors").read_text()

    def parse(self, item):
        return None

    def generate(self, items, progress):
        return [{"text": self.text} for _ in items]


if __name__ == "__main__":
    raise SystemExit(Reader.main())
"#;

#[tokio::test]
async fn a_worker_loads_the_revision_that_its_entry_names() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let site = Site::new();
    let cache = site.path().join("cache");
    let repository = cache.join("models--org--m");
    for (name, commit, text) in [("main", "aaa", "of main"), ("v1", "bbb", "of v1")] {
        let snapshot = repository.join("snapshots").join(commit);
        std::fs::create_dir_all(&snapshot).unwrap();
        std::fs::write(snapshot.join("model.safetensors"), text).unwrap();
        std::fs::create_dir_all(repository.join("refs")).unwrap();
        std::fs::write(repository.join("refs").join(name), commit).unwrap();
    }
    let script = site.path().join("reader.py");
    std::fs::write(&script, SERVER).unwrap();
    let entry = |revision: Option<&str>| {
        let mut entry = json!({
            "type": "custom", "service_script": script.display().to_string(), "python": python(root), "model": "org/m",
            "endpoint": "/v1/read", "gpus": 0, "memory": "1MiB",
        });
        if let Some(revision) = revision {
            entry["revision"] = json!(revision);
        }
        entry
    };
    let server = site
        .model("latest", entry(None))
        .model("tag", entry(Some("v1")))
        .model("commit", entry(Some("bbb")))
        .env("HF_HUB_CACHE", &cache.display().to_string())
        .env("PYTHONPATH", &root.join("models/base").display().to_string())
        .start()
        .await;
    for (model, text) in [("latest", "of main"), ("tag", "of v1"), ("commit", "of v1")] {
        let id = server.api.submit(&json!({"endpoint": "/v1/read", "body": {"model": model}})).await;
        server.api.succeeded(&id).await;
        let answer = server.api.get(&format!("/v1/jobs/{id}/response")).await.is(200).json();
        assert_eq!(answer["text"], text, "{model}: {answer}");
    }
}
