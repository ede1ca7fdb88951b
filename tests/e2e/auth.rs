//! Who may do what.

use std::os::unix::fs::PermissionsExt as _;

use reqwest::Method;
use serde_json::json;

use crate::common::{Site, echo, echo_job};

const PATHS: [(&str, &str); 17] = [
    ("GET", "/readyz"),
    ("GET", "/metrics"),
    ("GET", "/v1/jobs"),
    ("POST", "/v1/jobs"),
    ("POST", "/v1/jobs/bulk"),
    ("GET", "/v1/jobs/job_0190163d-8694-739b-aea5-966c26f8ad90"),
    ("GET", "/v1/jobs/job_0190163d-8694-739b-aea5-966c26f8ad90/events"),
    ("GET", "/v1/jobs/job_0190163d-8694-739b-aea5-966c26f8ad90/artifacts/art_0"),
    ("POST", "/v1/jobs/job_0190163d-8694-739b-aea5-966c26f8ad90/cancel"),
    ("GET", "/v1/queue"),
    ("GET", "/v1/queue/decisions"),
    ("GET", "/v1/models"),
    ("GET", "/v1/workers"),
    ("POST", "/v1/models/i/retry"),
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/images/generations"),
    ("GET", "/nowhere"),
];

fn site() -> Site {
    Site::new()
        .env("ROUNDHOUSE_API_KEYS", "alice:key-of-alice,bob:key-of-bob")
        .model("i", echo("image", &[] as &[&str]))
        .model("a", echo("custom", &[] as &[&str]))
}

#[tokio::test]
async fn without_a_valid_key_only_health_is_open() {
    let server = site().start().await;
    server.api.get("/health").await.is(200);
    let cases = [
        server.api.clone(),
        server.api.key("key-of-mallory"),
        server.api.key(""),
        server.api.header("authorization", "Basic a2V5LW9mLWFsaWNl"),
        server.api.header("authorization", "key-of-alice"),
    ];
    for api in cases {
        for (method, path) in PATHS {
            let method: Method = method.parse().unwrap();
            let body = (method == Method::POST).then(|| b"{}".to_vec());
            let reply = api.send(method, path, body).await.refused(401, "invalid_api_key");
            assert_eq!(reply.json()["error"]["type"], "authentication_error", "{path}");
        }
    }
    let alice = server.api.key("key-of-alice");
    alice.get("/readyz").await.is(200);
    alice.get("/metrics").await.is(200);
    let id = alice.submit_echo("a", json!({})).await;
    alice.succeeded(&id).await;
    let log = server.log();
    assert!(!log.contains("key-of-alice") && !log.contains("key-of-mallory"), "keys are not logged");
}

#[tokio::test]
async fn workers_get_none_of_our_secrets() {
    let site = site().env("HF_TOKEN", "hf_secret_of_ours");
    let server = site.start().await;
    let alice = server.api.key("key-of-alice");
    let id = alice.submit_echo("a", json!({})).await;
    alice.succeeded(&id).await;
    let worker = server.worker("a").await;
    let environ = std::fs::read(format!("/proc/{}/environ", worker.pid)).unwrap();
    let environ = String::from_utf8_lossy(&environ);
    assert!(!environ.contains("key-of-alice") && !environ.contains("hf_secret_of_ours"), "{environ}");
    assert!(environ.contains("HF_HUB_OFFLINE=1"), "{environ}");
}

#[tokio::test]
async fn other_tenants_jobs_are_not_there() {
    let server = site().start().await;
    let (alice, bob) = (server.api.key("key-of-alice"), server.api.key("key-of-bob"));
    let request = json!({"endpoint": "/v1/images/generations", "body": {"model": "i", "prompt": "mine"}});
    let id = alice.submit(&request).await;
    let running = alice.submit_echo("a", json!({"delay_ms": 60000})).await;
    for path in ["", "/events", "/response", "/artifacts", "/artifacts/art_0"] {
        bob.get(&format!("/v1/jobs/{id}{path}")).await.refused(404, "not_found");
    }
    for path in ["/cancel", "/retry"] {
        bob.poke(&format!("/v1/jobs/{id}{path}")).await.refused(404, "not_found");
        bob.poke(&format!("/v1/jobs/{running}{path}")).await.refused(404, "not_found");
    }
    assert_eq!(bob.get("/v1/jobs").await.is(200).json()["data"], json!([]));
    alice.succeeded(&id).await;
    for path in ["", "/events", "/response", "/artifacts", "/artifacts/art_0"] {
        bob.get(&format!("/v1/jobs/{id}{path}")).await.refused(404, "not_found");
    }
    bob.poke(&format!("/v1/jobs/{id}/retry")).await.refused(404, "not_found");
    let ids = alice.get("/v1/jobs").await.is(200).json();
    assert_eq!(ids["data"].as_array().unwrap().len(), 2, "{ids}");
    alice.poke(&format!("/v1/jobs/{running}/cancel")).await.is(200);
}

#[tokio::test]
async fn a_signed_url_opens_one_artifact_for_a_time() {
    let site = site();
    let server = site.start().await;
    let alice = server.api.key("key-of-alice");
    let request = json!({"model": "i", "prompt": "x", "n": 2, "response_format": "url"});
    let reply = alice.post("/v1/images/generations", &request).await.is(200);
    let id = reply.header("x-roundhouse-job-id").to_owned();
    let answer = reply.json();
    let url = answer["data"][0]["url"].as_str().unwrap().to_owned();
    assert!(url.starts_with(&format!("/v1/jobs/{id}/artifacts/art_0?")), "relative without a public address: {url}");
    let opened = server.api.get(&url).await.is(200);
    assert!(opened.body.starts_with(b"\x89PNG"));
    let part = server.api.header("range", "bytes=1-3").get(&url).await.is(206);
    assert_eq!(&part.body[..], b"PNG");

    let (path, query) = url.split_once('?').unwrap();
    let exp: i64 = query.split('&').find_map(|pair| pair.strip_prefix("exp=")).unwrap().parse().unwrap();
    let other_signature = {
        let (head, last) = url.split_at(url.len() - 5);
        format!("{head}{}", if last == "AAAAA" { "BBBBB" } else { "AAAAA" })
    };
    let secret: [u8; 32] = std::fs::read(site.data().join("url_secret")).unwrap().try_into().unwrap();
    let expired = roundhouse::http::auth::Signer::new(secret).sign(path, exp - 7 * 86_400);
    let tampered = [
        other_signature,
        url.replace(&format!("exp={exp}"), &format!("exp={}", exp + 1)),
        url.replace("art_0", "art_1"),
        path.to_owned(),
        format!("{path}?exp={exp}"),
        expired,
    ];
    for wrong in tampered {
        let reply = server.api.get(&wrong).await;
        assert!([401, 403].contains(&reply.status), "{wrong}: {} {}", reply.status, reply.text());
    }
    // It opens nothing but the artifact.
    let other = server.api.get(&format!("/v1/jobs/{id}?{query}")).await;
    assert!([401, 403].contains(&other.status), "{}", other.status);
    let method = server.api.send(Method::POST, &format!("/v1/jobs/{id}/cancel?{query}"), None).await;
    assert!([401, 403].contains(&method.status), "{}", method.status);
}

#[tokio::test]
async fn a_public_server_without_keys_makes_one_and_keeps_it_out_of_the_log() {
    let site = Site::new().listen("0.0.0.0:0").model("a", echo("custom", &[] as &[&str]));
    let server = site.start().await;
    let file = site.data().join("api_key");
    let mode = std::fs::metadata(&file).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let key = std::fs::read_to_string(&file).unwrap().trim().to_owned();
    assert!(key.len() >= 20, "{}", key.len());
    let shown = |text: &str| text.matches(&key).count();
    assert_eq!(shown(&server.log()) + shown(&server.said().join("\n")), 0, "no terminal, so only the file has it");
    assert!(server.log().contains(&file.display().to_string()), "which the log names");
    server.api.get("/v1/jobs").await.refused(401, "invalid_api_key");
    server.api.post("/v1/jobs", &echo_job("a", json!({}))).await.refused(401, "invalid_api_key");
    let owner = server.api.key(&key);
    let id = owner.submit_echo("a", json!({})).await;
    owner.succeeded(&id).await;
    drop(server);

    let server = site.start().await;
    assert_eq!(shown(&server.log()) + shown(&server.said().join("\n")), 0, "and so the next time");
    assert_eq!(server.api.key(&key).job(&id).await["state"], "succeeded", "it is still the key");
}
