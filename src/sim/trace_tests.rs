use proptest::prelude::*;

use super::*;

const HEAD: &str = "#box,gpus=2,gpu_gb=80,host_gb=0,seed=7\n\
    #model,a,gpus=1,gb_per_gpu=70,cold_s=30,wake_s=3,stop_s=1.5,limit=4,alpha=0.5,join=1,mean_work_s=3\n\
    arrival_s,model,class,deadline_s,tenant,work_s,count\n";

fn parse(text: &str) -> Result<Trace, TraceError> {
    Trace::parse("t", "t.csv", text)
}

fn refusal(text: &str) -> String {
    parse(text).unwrap_err().to_string()
}

#[test]
fn a_trace_is_read() {
    let trace = parse(&format!("{HEAD}5,a,batch,,t1,2,2\n1.5,a,interactive,99.5,t0,3,1\n")).unwrap();
    assert_eq!((trace.gpus, trace.gpu_gb, trace.host_gb, trace.seed, trace.exact_loads), (2, 80.0, 0.0, 7, false));
    assert_eq!(trace.tenants, ["t1", "t0"]);
    let arrivals: Vec<f64> = trace.jobs.iter().map(|job| job.arrival_s).collect();
    assert_eq!(arrivals, [1.5, 5.0, 5.0], "in order of arrival, counts taken apart");
    let first = TraceJob {
        arrival_s: 1.5,
        model: 0,
        class: Class::Interactive,
        deadline_s: Some(99.5),
        tenant: 1,
        work_s: 3.0,
    };
    assert_eq!(trace.jobs[0], first);
    assert!(Trace::parse("small-1", "x", &format!("{HEAD}5,a,batch,,t1,2,2\n")).unwrap().exact_loads);
}

#[test]
fn windows_files_and_comments_are_read_too() {
    let text = format!("\u{feff}# made by hand\n{HEAD}\n5,a,batch,,t1,2,2\n").replace('\n', "\r\n");
    assert_eq!(parse(&text).unwrap().jobs.len(), 2);
}

#[test]
fn each_mistake_is_named_with_its_line() {
    for (text, error) in [
        ("", "t.csv: no `#box,gpus=..,gpu_gb=..,host_gb=..,seed=..` line: is this a trace?"),
        ("#box,gpus=2\n", "t.csv:1: gpu_gb is missing: #box needs it"),
        ("#bax,gpus=2\n", "t.csv:1: `#bax` is unknown: a line is `#box,...`, `#model,...`, `# a comment` or a row"),
        ("#box,gpus=2,ram=8\n", "t.csv:1: `ram` is no key of #box; known are gpus, gpu_gb, host_gb, seed"),
        ("#box,gpus=0,gpu_gb=80,host_gb=0,seed=1\n", "t.csv:1: gpus: `0` is not a whole number from 1 to 1024"),
        ("#model,a,gpus=1\n", "t.csv:1: a `#model` line before the `#box` line"),
        (HEAD, "t.csv: no rows under `arrival_s,model,class,deadline_s,tenant,work_s,count`"),
    ] {
        assert_eq!(refusal(text), error);
    }
    for (row, error) in [
        ("x,a,batch,,t0,1,1", "arrival_s: `x` is not a number"),
        ("-1,a,batch,,t0,1,1", "arrival_s: `-1` is not in 0 to 1e9"),
        ("NaN,a,batch,,t0,1,1", "arrival_s: `NaN` is not in 0 to 1e9"),
        ("1,b,batch,,t0,1,1", "model: `b` has no `#model` line"),
        ("1,a,urgent,,t0,1,1", "class: `urgent` is neither `interactive` nor `batch`"),
        ("1,a,batch,soon,t0,1,1", "deadline_s: `soon` is not a number"),
        ("1,a,batch,,,1,1", "tenant: is empty"),
        ("1,a,batch,,t0,inf,1", "work_s: `inf` is not in 0 to 1e9"),
        ("1,a,batch,,t0,1,0", "count: `0` is not a whole number from 1 to 5000000"),
        ("1,a,batch,,t0,1", "6 fields, not the 7 of `arrival_s,model,class,deadline_s,tenant,work_s,count`"),
    ] {
        assert_eq!(refusal(&format!("{HEAD}{row}\n")), format!("t.csv:4: {error}"));
    }
    let model = |more: &str| refusal(&format!("#box,gpus=2,gpu_gb=80,host_gb=0,seed=7\n#model,{more}\n"));
    let rest = "cold_s=30,wake_s=3,stop_s=1.5,limit=4,alpha=0.5,join=1,mean_work_s=3";
    assert_eq!(model(&format!("a,gpus=4,gb_per_gpu=9,{rest}")), "t.csv:2: gpus: `a` needs 4, the box has 2");
    assert_eq!(
        model(&format!("a,gpus=1,gb_per_gpu=90,{rest}")),
        "t.csv:2: gb_per_gpu: `a` needs 90 GB on each GPU, which has 80"
    );
    assert_eq!(
        model(&format!("a,gpus=3,gb_per_gpu=9,{rest}")),
        "t.csv:2: gpus: 3 is no power of two: workers take aligned sets of GPUs"
    );
    assert_eq!(model("gpus=4"), "t.csv:2: `#model` needs a name first: `#model,NAME,gpus=1,...`");
}

#[test]
fn the_header_must_be_the_known_one() {
    let text = HEAD.replace("work_s,count", "work,count");
    let last = "the first line without `#` must be `arrival_s,model,class,deadline_s,tenant,work_s,count`";
    assert_eq!(refusal(&text), format!("t.csv:3: {last}"));
}

#[test]
fn a_file_that_is_no_text_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("x.csv");
    std::fs::write(&path, b"# fine\n\xff\xfe\n").unwrap();
    assert!(Trace::read(&path).unwrap_err().to_string().ends_with("x.csv:2: is not UTF-8 text; is this a trace?"));
    assert!(Trace::read(&dir.path().join("none")).unwrap_err().to_string().contains("none: cannot be read"));
}

#[test]
fn the_lower_bound_is_the_worst_tail() {
    // One job takes 2 s; at full batch four take 2 s * (1 + 0.5 * 3) together: 1.25 s each, on two GPUs 0.625 s.
    let early = parse(&format!("{HEAD}1,a,batch,,t0,2,8\n3,a,batch,,t0,2,1\n")).unwrap();
    assert!((early.lower_bound_s() - (1.0 + 9.0 * 0.625)).abs() < 1e-9);
    let late = parse(&format!("{HEAD}1,a,batch,,t0,2,2\n30,a,batch,,t0,2,1\n")).unwrap();
    assert!((late.lower_bound_s() - 32.0).abs() < 1e-9, "the last one alone");
}

#[test]
fn sets_are_aligned() {
    let trace = Trace { gpus: 6, ..parse(&format!("{HEAD}1,a,batch,,t0,2,1\n")).unwrap() };
    assert_eq!(trace.sets(1).collect::<Vec<_>>(), [0, 1, 2, 3, 4, 5]);
    assert_eq!(trace.sets(4).collect::<Vec<_>>(), [0]);
}

proptest! {
    /// Whatever a file holds, it is read or refused with a line, never with a panic.
    #[test]
    fn garbage_is_refused_in_words(text in "(#box|#model|#|,|=|gpus|arrival_s|[0-9.e-]|[a-z]|\n|\\PC){0,120}") {
        if let Err(error) = parse(&text) {
            prop_assert!(error.to_string().starts_with("t.csv:"));
        }
    }

    /// One character of a good file changed: the same.
    #[test]
    fn a_broken_good_file_is_refused_in_words(at in 0_usize..260, with in any::<char>()) {
        let mut text: Vec<char> = format!("{HEAD}1,a,batch,9,t0,2,3\n").chars().collect();
        let at = at.min(text.len() - 1);
        text[at] = with;
        match parse(&text.into_iter().collect::<String>()) {
            Ok(trace) => prop_assert!(!trace.jobs.is_empty()),
            Err(error) => prop_assert!(error.to_string().starts_with("t.csv:")),
        }
    }
}
