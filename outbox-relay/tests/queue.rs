//! The queue against a model of the broker that takes, refuses and loses at random: whatever happens,
//! an aggregate has one event under way at most, and its events are taken in their order.

#![expect(clippy::unwrap_used, reason = "a panic is the report of a test")]

use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

use chrono::Utc;
use outbox_relay::{
    queue::{DEPTH, Held, Item, Outcome, Queue},
    reader::Event,
};
use proptest::prelude::*;
use uuid::Uuid;

const LANES: usize = 3;
const WINDOW: usize = 8;

fn event(position: i64, aggregate: u8, type_: u8, id: u128) -> Event {
    Event {
        position,
        id: Uuid::from_u128(id),
        aggregate_type: "thing".to_owned(),
        aggregate_id: aggregate.to_string(),
        version: position,
        type_: type_.to_string(),
        payload: "{}".into(),
        headers: None,
        created_at: Utc::now(),
    }
}

/// What the broker does with an event.
#[derive(Clone, Copy, Debug)]
enum Fate {
    Take,
    Stop,
    Doubt,
}

#[derive(Clone, Debug)]
enum Step {
    /// Reads events: aggregate, type, id (few, so that some are the same).
    Add(Vec<(u8, u8, u8)>),
    /// Hands out windows and lets the oldest of this lane end.
    Work(usize, Vec<Fate>),
    /// The oldest window of this lane is lost, having failed or not.
    Lose(usize, bool),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let fate = prop_oneof![4 => Just(Fate::Take), 1 => Just(Fate::Stop), 1 => Just(Fate::Doubt)];
    let step = prop_oneof![
        2 => prop::collection::vec((0..6_u8, 0..3_u8, 0..40_u8), 1..30).prop_map(Step::Add),
        5 => (0..LANES, prop::collection::vec(fate, WINDOW)).prop_map(|(lane, fates)| Step::Work(lane, fates)),
        1 => (0..LANES, any::<bool>()).prop_map(|(lane, failed)| Step::Lose(lane, failed)),
    ];
    prop::collection::vec(step, 1..80)
}

/// A relay without a database and a broker.
struct Relay {
    queue: Queue,
    now: Instant,
    position: i64,
    under_way: Vec<Vec<Vec<Item>>>,
    /// What is not settled, by aggregate, in order.
    open: HashMap<String, Vec<i64>>,
    held: HashMap<i64, Held>,
}

impl Relay {
    fn new() -> Self {
        Self {
            queue: Queue::new(LANES, WINDOW),
            now: Instant::now(),
            position: 0,
            under_way: vec![Vec::new(); LANES],
            open: HashMap::new(),
            held: HashMap::new(),
        }
    }

    fn hand_out(&mut self) {
        // Longer than any pause.
        self.now += Duration::from_mins(1);
        for lane in 0..LANES {
            loop {
                let stopped = self.held.values().any(|held| *held == Held::Stop);
                let window = self.queue.next(lane, self.now);
                if window.is_empty() {
                    break;
                }
                assert!(window.len() <= WINDOW);
                let ids: std::collections::HashSet<Uuid> = window.iter().map(|i| i.event.id).collect();
                assert_eq!(ids.len(), window.len(), "an id twice in a window");
                for item in &window {
                    let position = item.event.position;
                    assert!(
                        !stopped || self.held.contains_key(&position),
                        "it did not wait for what is held"
                    );
                    // All before it are settled, or in doubt and not under way themselves.
                    for before in self.open[&item.event.aggregate_id].iter().take_while(|p| **p < position) {
                        assert_eq!(
                            self.held.get(before),
                            Some(&Held::Doubt),
                            "{position} overtakes {before}"
                        );
                    }
                    let twice = self.under_way.iter().flatten().flatten();
                    let same = |i: &&Item| i.event.aggregate_id == item.event.aggregate_id;
                    assert_eq!(twice.filter(same).count(), 0, "two of an aggregate under way");
                }
                self.under_way[lane].push(window);
            }
            assert!(self.under_way[lane].len() <= DEPTH, "a lane has more windows than it takes");
        }
    }

    fn end(&mut self, lane: usize, fates: &[Fate]) {
        if self.under_way[lane].is_empty() {
            return;
        }
        let window = self.under_way[lane].remove(0);
        let mut outcomes = HashMap::new();
        for (item, fate) in window.iter().zip(fates) {
            let position = item.event.position;
            let outcome = match fate {
                Fate::Take => Outcome::Settled,
                Fate::Stop => Outcome::Held(Held::Stop),
                Fate::Doubt => Outcome::Held(Held::Doubt),
            };
            match outcome {
                Outcome::Settled => {
                    self.held.remove(&position);
                    self.open.get_mut(&item.event.aggregate_id).unwrap().retain(|p| *p != position);
                }
                Outcome::Held(held) => {
                    self.held.insert(position, held);
                }
            }
            outcomes.insert(position, outcome);
        }
        self.queue.done(lane, &outcomes, self.now);
    }

    fn assert_counts(&self) {
        let open: usize = self.open.values().map(Vec::len).sum();
        assert_eq!(self.queue.events(), open);
        assert_eq!(self.queue.held(), self.held.len());
        assert_eq!(self.queue.windows(), self.under_way.iter().map(Vec::len).sum::<usize>());
        assert_eq!(self.queue.bytes() == 0, open == 0);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 500, ..ProptestConfig::default() })]

    #[test]
    fn order_holds_whatever_becomes_of_windows(steps in steps()) {
        let mut relay = Relay::new();
        for step in steps {
            match step {
                Step::Add(events) => {
                    for (aggregate, type_, id) in events {
                        relay.position += 1;
                        relay.open.entry(aggregate.to_string()).or_default().push(relay.position);
                        relay.queue.add(event(relay.position, aggregate, type_, id.into()));
                    }
                }
                Step::Work(lane, fates) => {
                    relay.hand_out();
                    relay.end(lane, &fates);
                }
                Step::Lose(lane, failed) => {
                    if !relay.under_way[lane].is_empty() {
                        let window = relay.under_way[lane].remove(0);
                        relay.queue.back(lane, &window, failed, relay.now);
                    }
                }
            }
            relay.assert_counts();
        }
        // In the end everything is taken: nothing was forgotten, and nothing waits for ever.
        for _ in 0..10_000 {
            relay.hand_out();
            for lane in 0..LANES {
                relay.end(lane, &[Fate::Take; WINDOW]);
            }
            if relay.queue.events() == 0 {
                break;
            }
        }
        relay.assert_counts();
        prop_assert_eq!(relay.queue.events(), 0);
    }
}
