//! Ports that somebody else takes after they were chosen.

use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt as _;

use super::*;

/// A worker whose `python` is this shell script, which has the real one's words as its own.
fn started_by(bench: &Bench, port: u16, script: &str) -> Worker {
    let python = bench.path().join("python.sh");
    std::fs::write(&python, format!("#!/bin/sh\n{script}")).unwrap();
    std::fs::set_permissions(&python, std::fs::Permissions::from_mode(0o755)).unwrap();
    let script = bench.path().join("toy.py");
    bench.supervise(ModelSpec { port, launch: Launch::Script { python, script }, ..bench.spec(&[]) })
}

/// Something of the worker's own listens on its port, if that is one of `ports` (a pattern), before it does.
fn squatted(ports: &str) -> String {
    let listen = "import socket, sys, time\n\
        listener = socket.create_server(('127.0.0.1', int(sys.argv[1])))\n\
        open('listens-' + sys.argv[1], 'w').close()\n\
        time.sleep(600)";
    format!(
        "case \"$5\" in {ports})\n\
         python3 -c \"{listen}\" \"$5\" &\n\
         while [ ! -e \"listens-$5\" ]; do sleep 0.02; done;;\n\
         esac\n\
         exec python3 \"$@\"\n"
    )
}

#[tokio::test]
async fn a_port_that_is_taken_after_it_was_chosen_costs_no_failed_load() {
    let bench = Bench::new();
    // It says nothing about what is wrong.
    let script = "while [ ! -e go ]; do sleep 0.02; done\nexec python3 \"$@\" 2> /dev/null\n";
    let mut worker = started_by(&bench, 8171, script);
    worker.handle.order(Order::Load);
    until("a port is chosen", || worker.handle.view().port.is_some()).await;
    let port = worker.handle.view().port.unwrap();
    let stranger = TcpListener::bind(("127.0.0.1", port)).unwrap();
    std::fs::write(bench.path().join("go"), "").unwrap();
    let Report::Ready { base_url, .. } = worker.settled().await else { panic!("not ready") };
    let view = worker.handle.view();
    assert_eq!((view.failed_loads, view.starts), (0, 2));
    assert_ne!(base_url, format!("http://127.0.0.1:{port}"));
    worker.stop().await;
    drop(stranger);
    bench.assert_nothing_left();
}

#[tokio::test]
async fn a_worker_that_says_that_its_port_is_taken_gets_another() {
    let bench = Bench::new();
    let mut worker = started_by(&bench, 8176, &squatted("8176"));
    assert_ne!(worker.load().await, "http://127.0.0.1:8176");
    assert_eq!((worker.handle.view().failed_loads, worker.handle.view().starts), (0, 2));
    worker.stop().await;
    bench.assert_nothing_left();
}

#[tokio::test]
async fn a_worker_that_finds_each_port_taken_does_not_load() {
    let bench = Bench::new();
    let mut worker = started_by(&bench, 8181, &squatted("*"));
    worker.handle.order(Order::Load);
    let Report::LoadFailed { error, .. } = worker.settled().await else { panic!("loaded") };
    assert!(error.message.contains("Address already in use"), "{}", error.message);
    assert_eq!((worker.handle.view().failed_loads, worker.handle.view().starts), (1, 3));
    bench.assert_nothing_left();
}

#[tokio::test]
async fn a_worker_that_finds_another_port_taken_does_not_load_and_is_not_tried_on_other_ports() {
    let said =
        "OSError: error while attempting to bind on address ('127.0.0.1', 9464): [Errno 98] Address already in use";
    for said in [said, "OSError: [Errno 98] Address already in use"] {
        let bench = Bench::new();
        let mut worker = started_by(&bench, 8191, &format!("echo \"{said}\" >&2\nexit 1\n"));
        worker.handle.order(Order::Load);
        let Report::LoadFailed { error, .. } = worker.settled().await else { panic!("loaded") };
        assert!(error.message.contains(said), "{}", error.message);
        assert_eq!((worker.handle.view().failed_loads, worker.handle.view().starts), (1, 1));
        bench.assert_nothing_left();
    }
}

#[tokio::test]
async fn the_worker_of_another_server_on_its_port_is_not_taken_for_it() {
    let bench = Bench::new();
    // Ready, and nothing that it says tells whose it is; the own one takes its time to find the port taken.
    let script = "if [ \"$5\" = 8186 ]; then\n\
        ROUNDHOUSE_INSTANCE=another:1 setsid python3 \"$@\" --vllm dev &\n\
        echo $! > stranger\n\
        sleep 600\n\
        fi\n\
        exec python3 \"$@\" --vllm dev\n";
    let mut worker = started_by(&bench, 8186, script);
    let base_url = worker.load().await;
    let stranger: i32 = std::fs::read_to_string(bench.path().join("stranger")).unwrap().trim().parse().unwrap();
    kill(Pid::from_raw(stranger), Signal::SIGKILL).ok();
    assert_ne!(base_url, "http://127.0.0.1:8186");
    assert_eq!((worker.handle.view().failed_loads, worker.handle.view().starts), (0, 2));
    worker.stop().await;
    bench.assert_nothing_left();
}
