//! Workers whose entry was edited while they run: a load by hand does not keep the old process.

use super::*;

/// `a` was woken and runs job 3.
fn running() -> World {
    let mut world = waking();
    world.report("a", ready(20));
    assert_eq!(world.state.models[0].queue.running().len(), 1);
    world
}

fn edit(world: &mut World, restart: bool) {
    let args = vec!["--new".to_owned()];
    let on_gpu = ModelSpec { gpus: 1, memory: Some(50 << 30), park: Park::Ram, args, ..spec("a", 1) };
    let edit = Edit { name: "a".into(), spec: Some(on_gpu), keys: vec!["args"], restart };
    world.event(Event::Edited(vec![edit]));
}

fn answer(world: &mut World) {
    world.event(Event::Ended { model: Arc::from("a"), number: 3, answered: true, suspect: false, back: None });
}

fn taken(world: &mut World) -> Vec<(String, Order)> {
    std::mem::take(&mut world.orders)
}

/// The old process has got no order but to stop; when it has, `a` is loaded from its new entry, as was asked by hand.
fn assert_is_loaded_anew(world: &mut World) {
    assert_eq!(taken(world), [("a".to_owned(), Order::Stop)]);
    world.report("a", Report::Stopped { stop_ms: 1 });
    assert_eq!(taken(world), [("a".to_owned(), Order::Load)]);
    assert!(!world.state.workers.iter().any(|worker| worker.is_outdated));
}

#[test]
fn a_load_by_hand_while_the_old_one_drains_is_of_the_new_entry() {
    let mut world = running();
    edit(&mut world, true);
    world.event(Event::Control(Control::Load("a".into())));
    assert_eq!(world.orders, [], "it still runs a job");
    answer(&mut world);
    assert_is_loaded_anew(&mut world);
}

#[test]
fn a_load_by_hand_while_the_old_one_is_being_parked_is_of_the_new_entry() {
    let mut world = running();
    answer(&mut world);
    world.queue(vec![job(9, "b")]);
    assert_eq!(taken(&mut world), [("a".to_owned(), Order::Park)]);
    edit(&mut world, true);
    world.event(Event::Control(Control::Load("a".into())));
    assert_eq!(world.orders, [], "first it has to be parked");
    world.report("a", Report::Parked { park_ms: 10 });
    assert_eq!(taken(&mut world), [("a".to_owned(), Order::Stop), ("b".to_owned(), Order::Wake)]);
    world.report("a", Report::Stopped { stop_ms: 1 });
    world.report("b", ready(20));
    world.event(Event::Ended { model: Arc::from("b"), number: 9, answered: true, suspect: false, back: None });
    world.report("b", Report::Parked { park_ms: 10 });
    assert_eq!(taken(&mut world), [("b".to_owned(), Order::Park), ("a".to_owned(), Order::Load)]);
}

#[test]
fn a_load_by_hand_takes_an_unload_back_of_what_is_as_its_entry_says() {
    let mut world = running();
    edit(&mut world, false);
    world.event(Event::Control(Control::Unload("a".into())));
    world.event(Event::Control(Control::Load("a".into())));
    answer(&mut world);
    assert_eq!(world.orders, [("a".to_owned(), Order::Park)], "its process need not end");
}

#[test]
fn a_load_by_hand_that_is_refused_takes_no_unload_back() {
    let mut world = running();
    world.event(Event::Control(Control::Unload("a".into())));
    let model = &mut world.state.models[0];
    model.trouble = Some(model.lacks_gpus());
    world.event(Event::Control(Control::Load("a".into())));
    answer(&mut world);
    assert_eq!(world.orders, [("a".to_owned(), Order::Stop)]);
}
