//! What a restart of the server keeps of what was learned.

use std::collections::BTreeMap;

use crate::domain::Park;
use crate::domain::worker::HostCopy;
use crate::policy::Knobs;
use crate::scheduler::state::tests::spec;
use crate::scheduler::state::*;

const GIB: u64 = 1 << 30;

fn parks() -> ModelSpec {
    ModelSpec { gpus: 1, park: Park::Ram, ..spec("a", 1) }
}

fn started(spec: &ModelSpec, learned: Option<Learned>) -> State {
    let learned: BTreeMap<String, Learned> = learned.into_iter().map(|learned| ("a".to_owned(), learned)).collect();
    let inventory = Inventory { host: 100 * GIB, ..Inventory::of(&BTreeMap::from([(0, 80 * GIB)]), GIB) };
    State::new(std::slice::from_ref(spec), Knobs::default(), &learned, 1).on(inventory)
}

/// What a run keeps in which the model was loaded once, after its worker said this of its copy.
fn learned(spec: &ModelSpec, host: HostCopy) -> Learned {
    let mut state = started(spec, None);
    state.on_event(Event::Control(Control::Load("a".into())), 0);
    state.step(0);
    let mut kept = None;
    let ready = Report::Ready { base_url: "http://a".into(), load_ms: 20_000 };
    for report in [Report::Takes { device_bytes: 30 * GIB }, Report::Host(host), ready] {
        for effect in state.on_event(Event::Report { model: "a".into(), replica: 0, report }, 1) {
            if let Effect::Learn { learned, .. } = effect {
                kept = Some(learned);
            }
        }
    }
    kept.expect("something was learned")
}

#[test]
fn a_start_says_what_can_be_parked_before_anything_is_loaded() {
    let copy = HostCopy {
        bytes: Some(25 * GIB),
        can_park: Some(true),
        note: Some("it is pageable".into()),
        ..HostCopy::default()
    };
    let kept = learned(&parks(), copy);
    let outlook = |state: &State| state.parking(0).map(|outlook| (outlook.can, outlook.why)).unwrap();
    let (can, why) = outlook(&started(&parks(), Some(kept.clone())));
    assert_eq!(
        (can, why.as_str()),
        (Some(true), "it takes 25 GiB of 100 GiB of host memory; its worker says: it is pageable")
    );
    let state = started(&parks(), Some(kept.clone()));
    assert_eq!(state.models[0].view(&state.inventory, Vec::new(), 0).bytes, Some(30 * GIB));
    assert!(state.models[0].copies_at_load(), "it is promised room for its copy by its first load");
    assert_eq!(outlook(&started(&parks(), None)).0, None, "without that nobody knows");

    let refusal =
        HostCopy { bytes: Some(0), can_park: Some(false), note: Some("no sleep mode".into()), ..HostCopy::default() };
    let state = started(&parks(), Some(learned(&parks(), refusal)));
    assert_eq!(outlook(&state), (Some(false), "its worker says that it cannot be: no sleep mode".to_owned()));
}

#[test]
fn an_entry_that_was_edited_meanwhile_has_told_nothing_of_its_memory() {
    let copy = HostCopy { bytes: Some(25 * GIB), can_park: Some(true), note: None, ..HostCopy::default() };
    let kept = Learned { keeps_bytes: Some(GIB), ..learned(&parks(), copy) };
    let edited = ModelSpec { args: vec!["--quant".into(), "fp8".into()], ..parks() };
    let state = started(&edited, Some(kept.clone()));
    let now = &state.models[0].learned;
    let none = (None, HostCopy::default(), None, None);
    assert_eq!((now.device_bytes, now.host.clone(), now.copies_at_load, now.keeps_bytes), none);
    assert_eq!(now.load_ms, Some(20_000.0), "its times are as good a guess as any");
    // What its worker does not see changes nothing, nor does a row of a release that did not say of which entry it is.
    let named = ModelSpec { aliases: vec!["b".into()], ..parks() };
    let state = started(&named, Some(kept.clone()));
    assert_eq!(state.models[0].to_keep(&state.inventory), kept);
    let old = Learned { entry: None, ..kept.clone() };
    assert_eq!(started(&edited, Some(old)).models[0].learned.device_bytes, Some(30 * GIB));
}
