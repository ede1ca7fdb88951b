//! `/metrics`: what workers tell themselves is passed on, and says whose it is.

use crate::parking::{is, site, there_and_back};

#[tokio::test]
async fn series_of_workers_say_whose_they_are_while_they_are_parked_too() {
    let server = site(&[]).start().await;
    let api = &server.api;
    let told = async || String::from_utf8(api.get("/metrics").await.is(200).body.to_vec()).unwrap();
    let none = told().await;
    assert!(!none.contains("roundhouse_worker_ready"), "nothing was started to answer this: {none}");

    there_and_back(api).await;
    is(api, "b", "parked").await;
    let text = told().await;
    let count = |line: &str| text.lines().filter(|l| *l == line).count();
    for (model, ready) in [("a", 1), ("b", 0)] {
        let line = format!("roundhouse_worker_ready{{model=\"{model}\",replica=\"0\"}} {ready}");
        assert_eq!(count(&line), 1, "{line}\n{text}");
    }
    assert!(!text.contains("roundhouse_worker_ready{model=\"c\""), "never loaded");
    assert_eq!(count("# TYPE roundhouse_worker_ready gauge"), 1, "{text}");
}
