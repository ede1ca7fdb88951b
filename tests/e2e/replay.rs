//! `roundhouse replay`: a trace on a real server of its own, beside its simulation.

use std::path::Path;
use std::process::Output;

use super::common;

/// Three jobs of `a`, and one of `b` that comes when they have long ended: two loads whoever plays it.
const TRACE: &str = "\
#box,gpus=1,gpu_gb=80,host_gb=0,seed=1
#model,a,gpus=1,gb_per_gpu=70,cold_s=30,wake_s=3,stop_s=1.5,limit=4,alpha=0.5,join=1,mean_work_s=3
#model,b,gpus=1,gb_per_gpu=70,cold_s=30,wake_s=3,stop_s=1.5,limit=4,alpha=0.5,join=0,mean_work_s=3
arrival_s,model,class,deadline_s,tenant,work_s,count
0,a,interactive,,t0,3,1
1,a,batch,,t1,3,2
240,b,interactive,,t0,3,1
";

async fn replay(trace: &Path, more: &[&str]) -> Output {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut command = tokio::process::Command::new(env!("CARGO_BIN_EXE_roundhouse"));
    command.arg("replay").arg(trace).arg("--echo").arg(root.join("models/echo"));
    command.arg("--python").arg(common::python(root)).args(more).env("TMPDIR", trace.parent().unwrap());
    command.output().await.unwrap()
}

#[tokio::test]
async fn a_trace_on_a_real_server_has_the_measures_of_the_simulation_beside_it() {
    let dir = tempfile::tempdir().unwrap();
    let trace = dir.path().join("two.csv");
    std::fs::write(&trace, TRACE).unwrap();
    let output = replay(&trace, &["--factor", "20"]).await;
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
    let line = |name: &str| text.lines().find(|line| line.trim_start().starts_with(name)).unwrap_or_default();
    let words = |name: &str| line(name).split_whitespace().map(str::to_owned).collect::<Vec<_>>();
    assert_eq!(words("simulated"), ["simulated", "live"], "{text}");
    assert_eq!(words("swaps"), ["swaps", "2.00", "2.00"], "{text}");
    // Nothing is left but the trace.
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);

    let output = replay(&trace, &["--factor", "0"]).await;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(said.contains("--factor: 0 must be a number from 1"), "{said}");
    std::fs::write(&trace, TRACE.replace("gpus=1,gpu_gb", "gpus=2,gpu_gb")).unwrap();
    let output = replay(&trace, &[]).await;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(said.contains("two cannot be replayed: it is for 2 GPUs"), "{said}");
}
