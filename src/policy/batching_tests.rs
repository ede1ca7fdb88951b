use proptest::prelude::*;

use super::*;

const KEY: i64 = 7;

/// Runs passes of what always waits in plenty; `ms`: what a pass of so many takes. Returns the sizes.
fn run(batching: &mut Batching, passes: usize, callers: bool, mut ms: impl FnMut(u32) -> f64) -> Vec<u32> {
    (0..passes)
        .map(|_| {
            let jobs = batching.next(KEY, 1_000, callers);
            #[expect(clippy::cast_possible_truncation, reason = "small")]
            batching.passed(KEY, Pass { jobs, ms: ms(jobs).round() as Millis, load: 1 });
            jobs
        })
        .collect()
}

/// Flux at 1024, on an H100.
fn flux(jobs: u32) -> f64 {
    match jobs {
        1 => 790.0,
        2 => 1_630.0,
        4 => 3_110.0,
        _ => 6_030.0 / 8.0 * f64::from(jobs),
    }
}

/// MusicGen: two cost more for each than one does, sixteen hardly more than four.
fn musicgen(jobs: u32) -> f64 {
    match jobs {
        1 => 7_200.0,
        2 | 3 => 16_000.0,
        4..=15 => 16_700.0 + 116.0 * f64::from(jobs - 4),
        _ => 18_100.0,
    }
}

#[test]
fn without_a_gain_passes_have_one_job() {
    for (first, most) in [(1, 8), (8, 8)] {
        let mut batching = Batching::new(first, most);
        run(&mut batching, 60, false, flux);
        assert_eq!(batching.usual(), 1, "from {first}");
        let shown = batching.shapes();
        assert_eq!((shown[0].batch_size, shown[0].max_batch), (1, 8));
        assert_eq!(shown[0].shape, "defaults", "it was given no words");
        let sizes = run(&mut batching, 1_000, false, flux);
        let single = sizes.iter().filter(|jobs| **jobs == 1).count();
        assert!((950..1_000).contains(&single), "tried again now and then: {single}");
    }
}

#[test]
fn a_gain_is_found_beyond_a_size_that_has_none() {
    for first in [1, 16] {
        let mut batching = Batching::new(first, 16);
        run(&mut batching, 60, false, musicgen);
        assert_eq!(batching.usual(), 16, "from {first}");
        let jobs: u32 = run(&mut batching, 500, false, musicgen).iter().sum();
        assert!(jobs > 500 * 15, "looking again costs next to nothing: {jobs}");
        let of_two = if first == 1 { 1 } else { 2 };
        assert_eq!(batching.next(KEY, 2, false), of_two, "from {first}: two were tried, or are not known");
    }
}

#[test]
fn a_short_job_loses_nothing_to_trials() {
    let mut batching = Batching::new(16, 16);
    assert_eq!(run(&mut batching, 12, false, musicgen), [16; 12]);
}

#[test]
fn few_that_wait_are_sent_as_what_is_best_for_few() {
    let mut batching = Batching::new(16, 16);
    for jobs in [1, 1, 1, 1, 2, 2, 2] {
        #[expect(clippy::cast_possible_truncation, reason = "small")]
        batching.passed(KEY, Pass { jobs, ms: musicgen(jobs) as Millis, load: 1 });
    }
    assert_eq!([1, 2, 3, 16].map(|waiting| batching.next(KEY, waiting, false)), [1, 1, 1, 16]);
    assert_eq!(batching.usual(), 16, "nothing speaks against it");
}

#[test]
fn callers_try_nothing_larger() {
    let mut batching = Batching::new(1, 8);
    assert_eq!(run(&mut batching, 200, true, |jobs| 100.0 + f64::from(jobs)), [1; 200]);
    run(&mut batching, 40, false, |jobs| 100.0 + f64::from(jobs));
    assert_eq!(batching.next(KEY, 1_000, true), 8, "what is known to pay is for them too");
}

#[test]
fn each_shape_has_its_own_size() {
    let mut batching = Batching::new(1, 8);
    for _ in 0..60 {
        for (key, fixed) in [(1, 10), (2, 1_000)] {
            let jobs = batching.next(key, 1_000, false);
            batching.passed(key, Pass { jobs, ms: fixed + 100 * i64::from(jobs), load: 1 });
        }
    }
    assert_eq!([1, 2].map(|key| batching.shapes.get(&key).map(|shape| shape.size(1))), [Some(1), Some(8)]);
}

#[test]
fn a_change_is_told_once_and_in_words() {
    let mut batching = Batching::new(1, 2);
    batching.name(KEY, "size 64x64".to_owned());
    let mut told = Vec::new();
    for _ in 0..100 {
        let jobs = batching.next(KEY, 1_000, false);
        let ms = 500 + 250 * i64::from(jobs);
        told.extend(batching.passed(KEY, Pass { jobs, ms, load: 1 }));
    }
    let [change] = &told[..] else { panic!("{told:?}") };
    let decision = change.decision("flux", 5);
    assert_eq!(decision.reason, "flux (size 64x64): 2 jobs a pass from now on, 2 a second; with 1 it was 1.3");
    assert_eq!((decision.action, decision.code, decision.numbers["jobs"]), ("batch", "batch", 2.0));
    let change = batching.out_of_memory(KEY, 2, vec![1]).expect("halved");
    let reason = change.decision("flux", 5).reason;
    assert_eq!(reason, "flux (size 64x64): 1 job a pass from now on, 2 at once ran out of memory");
}

#[test]
fn the_first_pass_after_a_load_counts_for_nothing() {
    let mut batching = Batching::new(1, 2);
    for load in 0..SAMPLES_MIN as i64 + 1 {
        batching.passed(KEY, Pass { jobs: 1, ms: 10, load });
    }
    assert_eq!(batching.shapes()[0].per_s, []);
    for _ in 0..SAMPLES_MIN {
        batching.passed(KEY, Pass { jobs: 1, ms: 10, load: SAMPLES_MIN as i64 });
    }
    assert_eq!(batching.shapes()[0].per_s, [(1, 100.0)]);
    let mut two_workers = Batching::new(1, 2);
    (0..2 + SAMPLES_MIN as i64).for_each(|n| drop(two_workers.passed(KEY, Pass { jobs: 1, ms: 10, load: n % 2 })));
    assert_eq!(two_workers.shapes()[0].per_s, [(1, 100.0)], "they take turns");
}

#[test]
fn a_model_that_has_become_another_is_learned_anew() {
    let mut batching = Batching::new(1, 8);
    run(&mut batching, 60, false, flux);
    assert_eq!(batching.usual(), 1);
    run(&mut batching, 600, false, |jobs| 1_000.0 + 10.0 * f64::from(jobs));
    assert!(batching.usual() > 1, "the size above was tried again");
    run(&mut batching, 2_000, false, flux);
    assert_eq!(batching.usual(), 1, "and the one below");
}

#[test]
fn memory_is_bounded() {
    let mut batching = Batching::new(1, 8);
    for key in 0..10_000 {
        batching.passed(key, Pass { jobs: 1, ms: 10, load: 1 });
        batching.passed(ALONE, Pass { jobs: 1, ms: 10, load: 1 });
    }
    assert_eq!((batching.shapes.len(), batching.shapes().len()), (SHAPES_MAX, SHOWN_MAX));
    assert!(batching.shapes.contains_key(&9_999) && !batching.shapes.contains_key(&0));
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(128) })]

    /// What a pass takes is a part that is fixed and one for each job; both are noisy, and now and then one takes thrice as
    /// long. The size in use is no far cry from the best one, and no larger than it has to be.
    #[test]
    fn the_size_in_use_is_nearly_the_best_whatever_the_noise(
        fixed in 0.0..20_000.0_f64,
        each in 100.0..2_000.0_f64,
        (first, most) in prop::sample::select(vec![(1, 8), (8, 8), (16, 16), (1, 32), (12, 12), (32, 32)]),
        noise in prop::collection::vec((0.97..1.03_f64, 0..20_u32), 400),
    ) {
        let mut batching = Batching::new(first, most);
        let mut noise = noise.into_iter();
        let cost = |jobs: u32| fixed + each * f64::from(jobs);
        // By size: passes since the last one that took so long.
        let mut since: HashMap<u32, u32> = HashMap::new();
        run(&mut batching, 400, false, |jobs| {
            let (factor, long) = noise.next().unwrap_or((1.0, 1));
            let since = since.entry(level_of(jobs)).or_default();
            *since += 1;
            cost(jobs) * if long == 0 && *since > 5 { *since = 0; 3.0 } else { factor }
        });
        let rate = |jobs: u32| f64::from(jobs) / cost(jobs);
        let usual = batching.usual();
        prop_assert!(rate(usual) > 0.7 * rate(most), "{} of {}: {:?}", usual, most, batching.shapes());
        if fixed < 0.01 * each {
            prop_assert_eq!(usual, 1);
        }
    }

    #[test]
    fn a_pass_has_a_job_and_never_more_than_fit(
        acts in prop::collection::vec((0..4_i64, 1..40_u32, any::<bool>(), 0..5_000_i64, 0..10_u32), 1..200),
        (first, most) in (1..20_u32, 1..40_u32),
    ) {
        let mut batching = Batching::new(first, most);
        let mut fits: HashMap<i64, u32> = HashMap::new();
        for (key, waiting, callers, ms, kind) in acts {
            let jobs = batching.next(key, waiting, callers);
            let fit = *fits.entry(key).or_insert(most);
            prop_assert!((1..=waiting.min(fit)).contains(&jobs), "{} of {}, {} fit", jobs, waiting, fit);
            if kind == 0 {
                batching.out_of_memory(key, jobs, Vec::new());
                if jobs > 1 {
                    fits.insert(key, fit.min(jobs / 2));
                }
            } else {
                batching.passed(key, Pass { jobs, ms, load: i64::from(kind / 5) });
            }
            prop_assert!(batching.usual() <= most);
        }
    }
}

#[test]
fn what_was_learned_before_a_restart_is_where_it_goes_on() {
    let mut before = Batching::new(1, 16);
    run(&mut before, 60, false, musicgen);
    let kept = before.kept();
    assert_eq!((kept.len(), kept[0].key, kept[0].level, kept[0].cap), (1, KEY, Some(4), None));
    let mut after = Batching::new(1, 16);
    assert_eq!((after.next(KEY, 1_000, true), after.usual()), (1, 1));
    after.restore(&kept);
    assert_eq!((after.next(KEY, 1_000, true), after.usual()), (16, 16), "callers have it at once");
    let jobs: u32 = run(&mut after, 300, false, musicgen).iter().sum();
    assert!(jobs > 300 * 15, "nothing is tried from the beginning: {jobs}");
    // It is a start: on something slower, one at a time is found soon.
    let mut other = Batching::new(1, 16);
    other.restore(&kept);
    run(&mut other, 300, false, |jobs| 1_000.0 * f64::from(jobs).powf(1.2));
    assert_eq!(other.usual(), 1);
}

#[test]
fn only_what_is_new_is_news() {
    let mut batching = Batching::new(1, 8);
    let mut news = 0;
    for _ in 0..1_000 {
        run(&mut batching, 1, false, flux);
        news += usize::from(batching.take_news());
    }
    assert!((4..=40).contains(&news), "{news} in a thousand passes");
    assert!(batching.out_of_memory(KEY, 2, vec![1]).is_some() && batching.take_news() && !batching.take_news());
}

#[test]
fn what_ran_out_of_memory_before_a_restart_is_not_tried_after_it() {
    let mut before = Batching::new(8, 8);
    before.out_of_memory(KEY, 8, vec![1]);
    let mut after = Batching::new(8, 8);
    after.restore(&before.kept());
    let sizes = run(&mut after, 500, false, |_| 500.0);
    assert_eq!(sizes.iter().max(), Some(&4));
    // Without that, a larger `max_batch` than before is tried; a smaller one holds.
    let mut before = Batching::new(1, 4);
    run(&mut before, 60, false, |_| 500.0);
    let (mut larger, mut smaller, mut off) = (Batching::new(1, 8), Batching::new(1, 2), Batching::new(1, 1));
    [&mut larger, &mut smaller, &mut off].into_iter().for_each(|batching| batching.restore(&before.kept()));
    run(&mut larger, 10, false, |_| 500.0);
    assert_eq!((larger.usual(), smaller.usual(), smaller.next(KEY, 9, true)), (8, 2, 2));
    assert_eq!(off.shapes(), []);
}

/// Most jobs of a pass of the only shape, and how many it has when enough wait.
fn in_force(batching: &Batching) -> (u32, u32) {
    let shapes = batching.shapes();
    let [shape] = &shapes[..] else { panic!("{shapes:?}") };
    (shape.max_batch, shape.batch_size)
}

/// A job that runs out of memory alone, after each pass that it is in. Returns how many those were.
fn culprit(batching: &mut Batching, number: i64) -> usize {
    let mut failed = 0;
    loop {
        let jobs = batching.next(KEY, 1_000, false);
        if jobs == 1 {
            break;
        }
        batching.out_of_memory(KEY, jobs, (number..number + i64::from(jobs)).collect());
        failed += 1;
    }
    batching.own_fault(KEY, number);
    batching.own_fault(KEY, number);
    failed
}

fn pays(jobs: u32) -> f64 {
    1_000.0 + f64::from(jobs)
}

#[test]
fn what_a_job_alone_is_to_blame_for_is_taken_back_with_the_next_pass() {
    for known in [0, 40] {
        let mut batching = Batching::new(8, 8);
        run(&mut batching, known, false, pays);
        let before = batching.clone();
        assert_eq!(culprit(&mut batching, 10), 3, "8, 4 and 2 at once");
        assert_eq!(in_force(&batching), (1, 1));
        batching.take_news();
        let change = batching.passed(KEY, Pass { jobs: 1, ms: 1_000, load: 1 }).expect("a change");
        let reason = change.decision("flux", 5).reason;
        assert_eq!(reason, "flux: 8 jobs a pass from now on, before 1: a job ran out of memory alone");
        assert_eq!((in_force(&batching), batching.take_news()), ((8, 8), true));
        assert_eq!(batching.usual(), before.usual());
        let speeds = |batching: &Batching| batching.shapes().first().map_or_else(Vec::new, |shape| shape.per_s.clone());
        assert_eq!(speeds(&batching), speeds(&before), "what was known is known");
        assert_eq!(run(&mut batching, 8, true, pays), [8; 8], "for callers, too");
    }
}

#[test]
fn what_passes_of_others_have_set_stays() {
    let mut batching = Batching::new(16, 16);
    batching.out_of_memory(KEY, 16, (1..17).collect());
    assert_eq!(culprit(&mut batching, 100), 3, "8, 4 and 2 at once");
    run(&mut batching, 1, false, pays);
    assert_eq!(in_force(&batching), (8, 8), "16 did not fit without it");
    // What it had nothing to do with is no matter of its.
    batching.own_fault(KEY, 1_000);
    batching.own_fault(KEY + 1, 1);
    run(&mut batching, 1, false, pays);
    assert_eq!(in_force(&batching), (8, 8));
    // What does not fit without it either is found anew.
    let mut batching = Batching::new(8, 8);
    culprit(&mut batching, 10);
    run(&mut batching, 1, false, pays);
    let fits = 2;
    let mut failed = 0;
    for number in 0..20 {
        let jobs = batching.next(KEY, 1_000, false);
        if jobs > fits {
            batching.out_of_memory(KEY, jobs, (100 * number..).take(jobs as usize).collect());
            failed += 1;
        } else {
            batching.passed(KEY, Pass { jobs, ms: 1_000, load: 1 });
        }
    }
    assert_eq!((failed, in_force(&batching)), (2, (2, 2)));
}

#[test]
fn each_job_that_never_fits_costs_its_own_halvings_at_most() {
    let mut batching = Batching::new(8, 8);
    for number in 0..50 {
        // One less where the next smaller size is tried.
        assert!((2..=3).contains(&culprit(&mut batching, 100 * number)));
        assert_eq!(run(&mut batching, 3, false, pays)[0], 1);
        assert_eq!(in_force(&batching), (8, 8));
    }
    // Of a shape of which none fits, the first one has found out.
    let mut batching = Batching::new(8, 8);
    let failed: Vec<usize> = (0..50).map(|number| culprit(&mut batching, 100 * number)).collect();
    assert_eq!((failed[0], failed[1..].iter().sum::<usize>()), (3, 0));
    assert_eq!(batching.shapes.values().map(|shape| shape.halvings.len()).sum::<usize>(), 3, "and no more is kept");
}

#[test]
fn who_is_to_blame_is_known_over_a_restart() {
    // What was learned goes on from there: before the job is alone, and after it.
    for restart_at in [2, 1] {
        let mut before = Batching::new(8, 8);
        run(&mut before, 40, false, pays);
        let mut jobs = 8;
        while jobs > restart_at {
            before.out_of_memory(KEY, jobs, (1..=i64::from(jobs)).collect());
            jobs /= 2;
        }
        if jobs == 1 {
            before.own_fault(KEY, 1);
        }
        let mut after = Batching::new(8, 8);
        after.restore(&before.kept());
        assert_eq!(in_force(&after).0, restart_at);
        after.own_fault(KEY, 1);
        run(&mut after, 1, false, pays);
        assert_eq!(in_force(&after), (8, 8));
        assert_eq!(after.shapes()[0].per_s.last().map(|(jobs, _)| *jobs), Some(8), "as fast as it was");
    }
    // An earlier release kept the limit only.
    let mut kept = Batching::new(8, 8);
    kept.out_of_memory(KEY, 8, vec![1]);
    let mut kept = kept.kept();
    kept[0].halvings.clear();
    let mut after = Batching::new(8, 8);
    after.restore(&kept);
    after.own_fault(KEY, 1);
    run(&mut after, 2, false, pays);
    assert_eq!((in_force(&after).0, after.kept()[0].cap), (4, Some(4)));
}
