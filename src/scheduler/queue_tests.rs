use super::*;

pub(in crate::scheduler) fn job(number: i64, priority: u8) -> QueuedJob {
    QueuedJob {
        number,
        model: Arc::from("a"),
        tenant: Arc::from("default"),
        face: Face::Async,
        priority,
        batch_key: 0,
        created_at: number,
        was_started: false,
        crash: None,
        not_before: None,
        start_deadline: None,
        deadline: None,
    }
}

fn queue(jobs: impl IntoIterator<Item = QueuedJob>) -> Queue {
    let mut queue = Queue::new(Arc::from("a"));
    jobs.into_iter().for_each(|job| queue.push(&job, 0));
    queue
}

fn numbers(runs: &[Run]) -> Vec<Vec<i64>> {
    runs.iter().map(|r| r.jobs.iter().map(|j| j.number).collect()).collect()
}

fn to(slots: Slots) -> To {
    To { worker: 0, slots, canary: None, service_ms: 0.0, charge_ms: 10.0 }
}

fn nobody() -> Served {
    Served::default()
}

const TEXT: Slots = Slots { limit: 4, max_batch: 1 };

#[test]
fn a_job_comes_out_as_it_went_in() {
    let all = QueuedJob {
        face: Face::Sync,
        batch_key: 0x1234_5678_9abc_def0,
        created_at: 1_790_000_000_123,
        was_started: true,
        crash: Some(3),
        not_before: Some(5),
        start_deadline: Some(6),
        deadline: Some(7),
        tenant: Arc::from("other"),
        ..job((1 << 34) - 1, 9)
    };
    let mut q = queue([job(1, 0), all.clone()]);
    assert_eq!(q.take_sync(), [all]);
    assert_eq!(q.remove(0, 1), Some(job(1, 0)));
    assert_eq!(q.remove(0, 1), None);
}

/// Runs isolated parts until all are done; `kills`: jobs that end the worker. Returns the runs as sizes, and who was
/// alone when the worker died.
fn search(count: i64, kills: &[i64]) -> (Vec<usize>, Vec<i64>) {
    let slots = Slots { limit: 32, max_batch: 32 };
    let mut q = queue((1..=count).map(|n| QueuedJob { crash: Some(1), ..job(n, 5) }));
    let (mut crash, mut sizes, mut found) = (1, Vec::new(), Vec::new());
    while q.len() > 0 {
        let run = q.admit(to(slots), &mut nobody(), 0).remove(0);
        assert!(run.alone && sizes.len() < 200);
        sizes.push(run.jobs.len());
        let dies = run.jobs.iter().any(|job| kills.contains(&job.number));
        crash += 1;
        for job in &run.jobs {
            q.end(job.number, 1.0, &mut nobody(), 0);
        }
        match &run.jobs[..] {
            [only] if dies => found.push(only.number),
            all if dies => all.iter().for_each(|j| q.push(&QueuedJob { crash: Some(crash), ..j.clone() }, 0)),
            _ => {}
        }
    }
    (sizes, found)
}

#[test]
fn a_killer_among_32_is_alone_after_five_more_runs_wherever_it_stands() {
    for killer in 1..=32 {
        let (sizes, found) = search(32, &[killer]);
        assert_eq!(found, [killer]);
        // Halves of 32: the part with the killer has one job after 16, 8, 4, 2 and 1.
        assert_eq!(sizes[..5], [16, 8, 4, 2, 1], "killer {killer}");
        assert!(sizes.len() <= 11, "killer {killer}: {sizes:?}");
    }
    assert_eq!(search(32, &[]).1, [0_i64; 0], "none of them did it");
    assert_eq!(search(1, &[1]), (vec![1], vec![1]));
    let mut two = search(32, &[3, 29]).1;
    two.sort_unstable();
    assert_eq!(two, [3, 29]);
}

#[test]
fn callers_first_then_priority_then_arrival() {
    let mut q = queue([job(1, 3), job(2, 5), job(3, 7), job(4, 9), job(5, 7)]);
    assert_eq!(numbers(&q.admit(to(TEXT), &mut nobody(), 0)), [[4], [3], [5], [2]]);
    assert_eq!((q.len(), q.running().len()), (1, 4));
}

#[test]
fn a_near_deadline_goes_before_priority() {
    let mut q = queue([job(1, 7), QueuedJob { deadline: Some(30_000), ..job(2, 6) }]);
    assert_eq!(numbers(&q.admit(to(Slots { limit: 1, max_batch: 1 }), &mut nobody(), 0)), [[2]]);
}

#[test]
fn runs_share_a_batch_key_and_wait_for_each_other() {
    let slots = Slots { limit: 3, max_batch: 3 };
    let keyed = |n, batch_key| QueuedJob { batch_key, ..job(n, 5) };
    let mut q = queue([keyed(1, 1), keyed(2, 2), keyed(3, 1), keyed(4, 1), keyed(5, 1)]);
    assert_eq!(numbers(&q.admit(to(slots), &mut nobody(), 0)), [[1, 3, 4]]);
    assert!(q.admit(to(slots), &mut nobody(), 0).is_empty(), "the next pass starts when this one has ended");
    for n in [1, 3, 4] {
        q.end(n, 1.0, &mut nobody(), 0);
    }
    assert_eq!(numbers(&q.admit(to(slots), &mut nobody(), 0)), [[2]]);
}

#[test]
fn jobs_isolated_by_a_crash_run_with_nobody_beside() {
    let crashed = |n| QueuedJob { crash: Some(1), ..job(n, 5) };
    let mut q = queue([job(1, 7)]);
    q.admit(to(TEXT), &mut nobody(), 0);
    [crashed(2), crashed(3), job(4, 7)].iter().for_each(|j| q.push(j, 0));
    assert!(
        q.admit(to(TEXT), &mut nobody(), 0).is_empty(),
        "waits until the worker is free, and lets nobody in before"
    );
    q.end(1, 1.0, &mut nobody(), 0);
    for expected in [2, 3] {
        let runs = q.admit(to(TEXT), &mut nobody(), 0);
        assert_eq!((numbers(&runs), runs[0].alone), (vec![vec![expected]], true));
        q.end(expected, 1.0, &mut nobody(), 0);
    }
    assert_eq!(numbers(&q.admit(to(TEXT), &mut nobody(), 0)), [[4]]);
}

#[test]
fn jobs_that_ran_out_of_memory_alone_run_with_nothing_beside_and_acquit_nobody() {
    let hungry = |n| QueuedJob { crash: Some(crate::policy::retry::own_mark(n)), ..job(n, 5) };
    let suspect = |n| QueuedJob { crash: Some(1), ..job(n, 5) };
    let mut q = queue([suspect(1), suspect(2), suspect(3), suspect(4)]);
    assert_eq!(numbers(&q.admit(to(TEXT), &mut nobody(), 0)), [[1, 2]], "the first half");
    q.end(1, 1.0, &mut nobody(), 0);
    q.push(&hungry(1), 0);
    q.push(&hungry(9), 0);
    q.end(2, 1.0, &mut nobody(), 0);
    let mut runs = Vec::new();
    while q.len() > 0 {
        let all = q.admit(to(TEXT), &mut nobody(), 0);
        assert!(all.len() == 1 && all[0].alone);
        all[0].jobs.iter().for_each(|job| drop(q.end(job.number, 1.0, &mut nobody(), 0)));
        runs.extend(numbers(&all));
    }
    assert_eq!(runs, [vec![3], vec![4], vec![1], vec![9]], "no death in between says that 3 and 4 are innocent");
}

#[test]
fn delayed_jobs_wait_aside() {
    let mut q = queue([QueuedJob { not_before: Some(50), ..job(1, 5) }]);
    assert_eq!((q.pending(), q.next_wake(), q.len()), ((0, 0), Some(50), 1));
    q.wake(49);
    assert!(q.admit(to(TEXT), &mut nobody(), 49).is_empty());
    q.wake(50);
    assert_eq!(numbers(&q.admit(to(TEXT), &mut nobody(), 50)), [[1]]);
}

#[test]
fn jobs_of_an_endpoint_that_is_not_served_stand_aside_until_they_are_let_in_again() {
    let crashed = QueuedJob { crash: Some(1), ..job(2, 5) };
    let delayed = QueuedJob { not_before: Some(50), ..job(3, 5) };
    let mut q = queue([job(1, 7), crashed.clone(), delayed.clone(), job(4, 5)]);
    [(7, 1), (5, 2), (5, 3)].into_iter().for_each(|(priority, number)| q.set_aside(priority, number));
    q.wake(60);
    assert_eq!((q.pending(), q.len(), q.recount().len()), ((0, 1), 4, 4));
    assert_eq!(numbers(&q.admit(to(TEXT), &mut nobody(), 60)), [[4]]);
    assert_eq!(q.remove(5, 2), Some(crashed), "as it was");
    q.readmit(40);
    assert!(!q.is_unserved(1) && q.is_delayed(&delayed));
    assert_eq!((q.pending(), q.recount().len()), ((1, 0), 2));
}

#[test]
fn removing_leaves_no_trace() {
    let mut q = queue([
        QueuedJob { deadline: Some(9), ..job(1, 5) },
        QueuedJob { not_before: Some(9), ..job(2, 5) },
        QueuedJob { crash: Some(1), ..job(3, 5) },
    ]);
    assert_eq!(q.take_overdue(9).iter().map(|job| job.number).collect::<Vec<_>>(), [1]);
    for n in 2..=3 {
        assert!(q.remove(5, n).is_some());
    }
    assert_eq!((q.pending(), q.next_wake(), q.take_overdue(100).len(), q.heads(9).len()), ((0, 0), None, 0, 0));
    assert_eq!((q.len(), q.rare.len(), q.isolated.len()), (0, 0, 0));
}

#[test]
fn the_tenant_that_was_served_least_is_next() {
    let of = |tenant: &str, numbers: std::ops::RangeInclusive<i64>| {
        let tenant: Arc<str> = Arc::from(tenant);
        numbers.map(move |n| QueuedJob { tenant: tenant.clone(), ..job(n, 5) }).collect::<Vec<_>>()
    };
    let mut q = queue(of("flood", 1..=9).into_iter().chain(of("sparse", 10..=12)));
    let mut served = nobody();
    assert_eq!(numbers(&q.admit(to(TEXT), &mut served, 0)), [[1], [10], [2], [11]], "in turn, by arrival first");
    // The flood's jobs took 100 ms of the worker each and the others nothing: what they had counts, not the advance.
    for n in [10, 11] {
        q.end(n, 1.0, &mut served, 0);
    }
    for n in [1, 2] {
        q.end(n, 1.0, &mut served, 200);
    }
    assert_eq!((served.of("flood"), served.of("sparse")), (200.0, 0.0));
    let one = To { slots: Slots { limit: 1, max_batch: 1 }, ..to(TEXT) };
    assert_eq!(numbers(&q.admit(one, &mut served, 200)), [[12]]);
    // Runs of several jobs are filled in the same order.
    let mut q = queue(of("flood", 1..=9).into_iter().chain(of("sparse", 10..=12)));
    let runs = q.admit(to(Slots { limit: 4, max_batch: 4 }), &mut nobody(), 0);
    assert_eq!(numbers(&runs), [[1, 10, 2, 11]]);
}

#[test]
fn a_worker_is_filled_whatever_the_others_of_its_model_run() {
    let mut q = queue((1..=6).map(|n| job(n, 5)));
    assert_eq!(q.admit(to(TEXT), &mut nobody(), 0).len(), 4);
    let second = To { worker: 1, ..to(TEXT) };
    assert_eq!(numbers(&q.admit(second, &mut nobody(), 0)), [[5], [6]]);
    assert_eq!((q.running_on(0), q.running_on(1)), (4, 2));
    q.end(1, 1.0, &mut nobody(), 0);
    assert_eq!((q.running_on(0), q.running_on(1)), (3, 2));
}

#[test]
fn the_fast_path_passes_nobody() {
    let mut q = queue([]);
    assert!(q.has_free_slot(TEXT, 7, 0));
    q.push(&QueuedJob { not_before: Some(50), ..job(1, 5) }, 0);
    assert!(q.has_free_slot(TEXT, 7, 0), "a delayed job is not passed");
    q.push(&job(2, 0), 0);
    assert!(!q.has_free_slot(TEXT, 9, 0));
}

#[test]
fn ranks_are_counted_from_the_nearer_end() {
    let q = queue((1..=100).map(|n| job(n, 5)));
    for (number, rank) in [(1, Some(0)), (6, Some(5)), (50, None), (95, Some(94)), (100, Some(99))] {
        assert_eq!(q.rank(5, number, 10), rank, "{number}");
    }
}

#[test]
fn rank_and_oldest() {
    let q = queue([job(9, 5), job(3, 7), job(4, 2), job(5, 8)]);
    assert_eq!([(8, 5), (7, 3), (5, 9), (2, 4)].map(|(p, n)| q.rank(p, n, 100)), [Some(0), Some(1), Some(2), Some(3)]);
    assert_eq!((q.oldest(Class::Batch), q.oldest(Class::Interactive)), (Some(4), Some(3)));
}

fn keyed(number: i64, priority: u8, batch_key: i64) -> QueuedJob {
    QueuedJob { batch_key, ..job(number, priority) }
}

const RUNS: Slots = Slots { limit: 8, max_batch: 8 };

/// The first run of these jobs.
fn first_run(jobs: impl IntoIterator<Item = QueuedJob>) -> Vec<i64> {
    numbers(&queue(jobs).admit(to(RUNS), &mut nobody(), 0)).remove(0)
}

#[test]
fn a_run_passes_no_job_of_higher_priority_and_no_caller() {
    let mixed = [keyed(1, 5, 1), keyed(2, 5, 1), keyed(3, 4, 2), keyed(4, 3, 1)];
    assert_eq!(first_run(mixed), [1, 2], "the last one would pass a job of higher priority");
    assert_eq!(first_run([keyed(1, 5, 1), keyed(2, 5, 2), keyed(3, 5, 1)]), [1, 3], "age alone is passed");
    let other = QueuedJob { tenant: Arc::from("other"), ..keyed(3, 5, 2) };
    assert_eq!(first_run([keyed(1, 5, 1), keyed(2, 4, 1), other]), [1, 2], "another tenant has its own turn");
    let young = [keyed(1, 5, 1), keyed(2, 5, 1), keyed(3, 5, 1), keyed(4, 7, 2)];
    assert_eq!(first_run(young), [4], "a caller of another shape is not passed, and not joined");
    assert_eq!(first_run([keyed(1, 7, 1), keyed(2, 7, 2), keyed(3, 5, 1)]), [1], "nor made to wait for batch jobs");
    assert_eq!(first_run([keyed(1, 7, 1), keyed(2, 7, 1), keyed(3, 5, 1)]), [1, 2, 3], "which join if nobody is");
}

#[test]
fn the_turn_of_batch_comes_every_eighth_run_however_long_the_runs_are() {
    let callers = (1..=200).map(|n| keyed(n, 7, 1));
    let mut q = queue(callers.chain((201..=240).map(|n| keyed(n, 5, 2))));
    let runs = (0..16).map(|_| {
        let run = numbers(&q.admit(to(RUNS), &mut nobody(), 0)).remove(0);
        run.iter().for_each(|n| drop(q.end(*n, 1.0, &mut nobody(), 0)));
        run
    });
    let batch: Vec<usize> = runs.enumerate().filter(|(_, run)| run[0] > 200).map(|(turn, _)| turn).collect();
    assert_eq!(batch, [7, 15]);
}

#[test]
fn a_near_deadline_comes_early_in_a_run_too() {
    let near = QueuedJob { deadline: Some(20_000), ..job(9, 4) };
    assert_eq!(first_run([job(1, 5), QueuedJob { deadline: Some(10_000), ..job(2, 3) }, near]), [2, 9, 1]);
}

#[test]
fn weights_count_within_a_run() {
    let of = |tenant: &str, numbers: std::ops::RangeInclusive<i64>| {
        let tenant: Arc<str> = Arc::from(tenant);
        numbers.map(move |n| QueuedJob { tenant: tenant.clone(), ..job(n, 5) }).collect::<Vec<_>>()
    };
    let mut q = queue(of("light", 1..=8).into_iter().chain(of("heavy", 11..=18)));
    let mut served = Served::new(HashMap::new(), HashMap::from([(Arc::from("heavy"), 3.0)]));
    let run = numbers(&q.admit(to(RUNS), &mut served, 0)).remove(0);
    assert_eq!(run.iter().filter(|n| **n > 10).count(), 6, "{run:?}");
}

#[test]
fn a_job_that_shares_with_nobody_runs_alone() {
    let alone = |n| keyed(n, 5, ALONE);
    assert_eq!(numbers(&queue([alone(1), alone(2)]).admit(to(RUNS), &mut nobody(), 0)), [[1]]);
}

mod in_order {
    use proptest::prelude::*;

    use super::*;

    prop_compose! {
        fn any_job()(
            priority in prop::sample::select(vec![0_u8, 3, 5, 5, 6, 7, 9]),
            batch_key in 0..3_i64,
            tenant in prop::sample::select(vec!["a", "b", "c"]),
            deadline in prop::option::weighted(0.2, 1..200_000_i64),
        ) -> QueuedJob {
            QueuedJob { deadline, tenant: Arc::from(tenant), ..keyed(0, priority, batch_key) }
        }
    }

    /// In which order the jobs would go one at a time.
    fn one_by_one(jobs: &[QueuedJob], served: &mut Served) -> Vec<i64> {
        let one = Slots { limit: u32::MAX, max_batch: 1 };
        let mut q = queue(jobs.iter().cloned());
        let runs: Vec<Run> = std::iter::from_fn(|| q.admit_one(to(one), &Batching::new(1, 1), served, 0)).collect();
        numbers(&runs).concat()
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(256) })]

        /// A run begins with the job that goes first one at a time, and the rest are the first of those with its key, by
        /// class, in the order in which they would go one at a time if there were no others.
        #[test]
        fn a_run_is_filled_in_the_queues_own_order(
            jobs in prop::collection::vec(any_job(), 1..40),
            most in 2..9_u32,
        ) {
            let mut jobs = jobs;
            (1..).zip(&mut jobs).for_each(|(n, job)| (job.number, job.created_at) = (n, n));
            let slots = Slots { limit: most, max_batch: most };
            let run = numbers(&queue(jobs.iter().cloned()).admit(to(slots), &mut nobody(), 0)).remove(0);
            let first = one_by_one(&jobs, &mut nobody())[0];
            prop_assert_eq!(run[0], first);

            let of = |number: i64| jobs.iter().find(|job| job.number == number).expect("one of them");
            let begun = of(first);
            let mut served = nobody();
            served.charge(&begun.tenant, 10.0);
            let alike = |class| -> Vec<QueuedJob> {
                let alike = jobs.iter().filter(|job| job.batch_key == begun.batch_key && job.number != first);
                alike.filter(|job| Class::of(job.priority) == class).cloned().collect()
            };
            let mut expected = one_by_one(&alike(Class::Interactive), &mut served);
            expected.extend(one_by_one(&alike(Class::Batch), &mut served));
            // In this order, with those left out that may not pass another one.
            let mut rest = expected.iter();
            for number in &run[1..] {
                prop_assert!(rest.any(|next| next == number), "{:?} of {:?}", run, expected);
            }
            for job in run.iter().map(|number| of(*number)) {
                for passed in jobs.iter().filter(|other| other.batch_key != begun.batch_key) {
                    let class = |job: &QueuedJob| Class::of(job.priority);
                    let is_caller = class(passed) == Class::Interactive && class(begun) == Class::Interactive;
                    prop_assert!(!(is_caller && class(job) == Class::Batch), "{} passes the caller {}", job.number, passed.number);
                    let is_urgent = job.deadline.is_some_and(|at| at <= near_deadline(0.0, 0)) || job.number == first;
                    let is_higher = passed.tenant == job.tenant && class(passed) == class(job) && passed.priority > job.priority;
                    prop_assert!(is_urgent || !is_higher, "{} passes {}", job.number, passed.number);
                }
            }
            // Nobody is left out without a reason.
            let has_reason = jobs.iter().any(|job| job.batch_key != begun.batch_key);
            let count = (expected.len() + 1).min(most as usize);
            prop_assert!(has_reason || run.len() == count, "{:?} of {:?}", run, expected);
        }
    }
}
