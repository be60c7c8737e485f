//! What leads from an exchange to queues, and which routing keys go there.

use std::collections::{BTreeMap, BTreeSet, HashSet, VecDeque};

use serde_json::{Map, Value};

use super::{
    Binding,
    pattern::{Pattern, Places},
};

/// So many steps of patterns are taken to find out whether a queue gets all keys of one.
const MAX_STEPS: usize = 500_000;
/// How a binding of a headers exchange matches.
const X_MATCH: &str = "x-match";

/// A message's headers, as far as they are known.
pub type Headers = BTreeMap<String, Value>;

/// Whether a message gets somewhere.
///
/// ```
/// assert!(amqp::Reaches::No < amqp::Reaches::Perhaps && amqp::Reaches::Perhaps < amqp::Reaches::Yes);
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Reaches {
    /// No binding takes it there.
    No,
    /// It depends on headers that are not known, or on an exchange that chooses.
    Perhaps,
    /// A binding takes it there.
    Yes,
}

/// Whether a queue gets each routing key of a pattern.
///
/// ```no_run
/// # fn example(bindings: &amqp::Bindings) {
/// if let amqp::Coverage::Misses(key) = bindings.cover("order.*", "mail") {
///     println!("mail does not get {key}");
/// }
/// # }
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Coverage {
    /// It gets each.
    All,
    /// As far as can be known: some of them by bindings on headers, or by an exchange that chooses.
    Perhaps,
    /// It does not get this one, for example.
    Misses(String),
    /// There are too many bindings to say.
    TooMany,
}

/// Where a binding leads.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Place {
    Exchange(String),
    Queue(String),
}

/// What a binding takes.
#[derive(Clone, Debug)]
enum Takes {
    Key(Pattern),
    Everything,
    Headers(Map<String, Value>),
    /// As an exchange chooses that is not known here.
    Some,
}

#[derive(Clone, Debug)]
struct Edge {
    from: Place,
    to: Place,
    takes: Takes,
}

/// All bindings of an exchange, and of the exchanges that it feeds.
///
/// ```no_run
/// # async fn example(management: amqp::Management) -> Result<(), amqp::ManagementError> {
/// let bindings = management.bindings("/", "event_dispatcher").await?;
/// # Ok(()) }
/// ```
#[derive(Clone, Debug)]
pub struct Bindings {
    origin: Place,
    edges: Vec<Edge>,
    followed: BTreeSet<String>,
    to_follow: BTreeSet<String>,
}

impl Bindings {
    pub(super) fn of(exchange: &str) -> Self {
        Self {
            origin: Place::Exchange(exchange.to_owned()),
            edges: Vec::new(),
            followed: BTreeSet::new(),
            to_follow: BTreeSet::from([exchange.to_owned()]),
        }
    }

    pub(super) fn is_origin(&self, exchange: &str) -> bool {
        self.origin == Place::Exchange(exchange.to_owned())
    }

    pub(super) fn next_exchange(&self) -> Option<String> {
        self.to_follow.first().cloned()
    }

    pub(super) fn exchanges(&self) -> usize {
        self.followed.len() + self.to_follow.len()
    }

    /// These are the bindings of an exchange of this kind.
    pub(super) fn follow(&mut self, exchange: &str, kind: &str, bindings: Vec<Binding>) {
        self.to_follow.remove(exchange);
        self.followed.insert(exchange.to_owned());
        for binding in bindings {
            let Binding { destination, destination_type, routing_key, arguments } = binding;
            let to = match &*destination_type {
                "exchange" => Place::Exchange(destination),
                _ => Place::Queue(destination),
            };
            if let Place::Exchange(name) = &to
                && !self.followed.contains(name)
            {
                self.to_follow.insert(name.clone());
            }
            let takes = match kind {
                "topic" => Takes::Key(Pattern::topic(&routing_key)),
                "direct" => Takes::Key(Pattern::exactly(&routing_key)),
                "fanout" => Takes::Everything,
                "headers" => Takes::Headers(arguments),
                _ => Takes::Some,
            };
            self.edges.push(Edge { from: Place::Exchange(exchange.to_owned()), to, takes });
        }
    }

    /// The queues that a message reaches, or perhaps reaches, by name. Of `headers`, those that are not named are not
    /// known.
    ///
    /// ```no_run
    /// # fn example(bindings: &amqp::Bindings) {
    /// for (queue, reaches) in bindings.queues("order.new", &amqp::Headers::default()) {
    ///     println!("{queue}: {reaches:?}");
    /// }
    /// # }
    /// ```
    pub fn queues(&self, key: &str, headers: &Headers) -> BTreeMap<&str, Reaches> {
        let takes = self.edges.iter().map(|edge| edge.takes.takes(key, headers)).collect::<Vec<_>>();
        let reached = self.reached(&takes).into_iter();
        reached
            .filter_map(|(place, reaches)| match place {
                Place::Queue(name) => Some((name.as_str(), reaches)),
                Place::Exchange(_) => None,
            })
            .collect()
    }

    /// Whether the queue gets each routing key that fits the topic pattern.
    ///
    /// ```no_run
    /// # fn example(bindings: &amqp::Bindings) {
    /// let gets_all = bindings.cover("order.*", "mail") == amqp::Coverage::All;
    /// # }
    /// ```
    pub fn cover(&self, pattern: &str, queue: &str) -> Coverage {
        let way = self.to_queue(queue);
        let asked = Pattern::topic(pattern);
        let words = words(&asked, &way);
        let mut seen: HashSet<(Places, Vec<Places>)> = HashSet::new();
        let mut next = VecDeque::from([(asked.start(), way.start(), None::<String>)]);
        let (mut steps, mut coverage) = (0, Coverage::All);
        // Words are added one by one, to what is asked for and to each binding side by side.
        while let Some((places, of_edges, key)) = next.pop_front() {
            if let Some(key) = key.as_ref().filter(|_| asked.fits(&places)) {
                let takes = way.takes(&of_edges);
                match way.reached(&takes).get(&Place::Queue(queue.to_owned())) {
                    Some(Reaches::Yes) => {}
                    Some(Reaches::Perhaps) => coverage = Coverage::Perhaps,
                    Some(Reaches::No) | None => return Coverage::Misses(key.clone()),
                }
            }
            for word in &words {
                let after = asked.after(&places, word);
                steps += 1 + way.edges.len();
                if after.is_empty() {
                    continue;
                }
                if steps > MAX_STEPS {
                    return Coverage::TooMany;
                }
                let edges = way.after(&of_edges, word);
                if seen.insert((after.clone(), edges.clone())) {
                    let key = key.as_ref().map_or_else(|| word.clone(), |key| format!("{key}.{word}"));
                    next.push_back((after, edges, Some(key)));
                }
            }
        }
        coverage
    }

    /// Only what leads to the queue.
    fn to_queue(&self, queue: &str) -> Self {
        let mut places = BTreeSet::from([Place::Queue(queue.to_owned())]);
        loop {
            let before = places.len();
            let sources = self.edges.iter().filter(|edge| places.contains(&edge.to));
            let sources: Vec<_> = sources.map(|edge| edge.from.clone()).collect();
            places.extend(sources);
            if places.len() == before {
                break;
            }
        }
        let edges = self.edges.iter().filter(|edge| places.contains(&edge.to)).cloned().collect();
        Self { edges, origin: self.origin.clone(), followed: BTreeSet::new(), to_follow: BTreeSet::new() }
    }

    /// How surely each place is reached, when each binding takes the message as `takes` says.
    fn reached(&self, takes: &[Reaches]) -> BTreeMap<&Place, Reaches> {
        let mut reached = BTreeMap::from([(&self.origin, Reaches::Yes)]);
        loop {
            let mut is_more = false;
            for (edge, takes) in self.edges.iter().zip(takes) {
                let from = reached.get(&edge.from).copied().unwrap_or(Reaches::No);
                let to = from.min(*takes);
                if to > reached.get(&edge.to).copied().unwrap_or(Reaches::No) {
                    reached.insert(&edge.to, to);
                    is_more = true;
                }
            }
            if !is_more {
                return reached;
            }
        }
    }

    fn start(&self) -> Vec<Places> {
        self.edges.iter().map(|edge| edge.takes.pattern().map_or_else(Vec::new, Pattern::start)).collect()
    }

    fn after(&self, places: &[Places], word: &str) -> Vec<Places> {
        let after = |(edge, places): (&Edge, &Places)| {
            edge.takes.pattern().map_or_else(Vec::new, |pattern| pattern.after(places, word))
        };
        self.edges.iter().zip(places).map(after).collect()
    }

    fn takes(&self, places: &[Places]) -> Vec<Reaches> {
        let takes = |(edge, places): (&Edge, &Places)| match edge.takes.pattern() {
            Some(pattern) if pattern.fits(places) => Reaches::Yes,
            Some(_) => Reaches::No,
            None => edge.takes.takes("", &Headers::new()),
        };
        self.edges.iter().zip(places).map(takes).collect()
    }
}

/// Each word that the patterns name, and one that none of them does: it stands for all others.
fn words(asked: &Pattern, way: &Bindings) -> Vec<String> {
    let of_edges = way.edges.iter().filter_map(|edge| edge.takes.pattern()).flat_map(Pattern::words);
    let named: BTreeSet<&str> = asked.words().chain(of_edges).collect();
    let mut other = "x".to_owned();
    while named.contains(&*other) {
        other.push('x');
    }
    [other].into_iter().chain(named.into_iter().map(str::to_owned)).collect()
}

impl Takes {
    fn pattern(&self) -> Option<&Pattern> {
        match self {
            Self::Key(pattern) => Some(pattern),
            _ => None,
        }
    }

    fn takes(&self, key: &str, headers: &Headers) -> Reaches {
        match self {
            Self::Key(pattern) if pattern.matches(key) => Reaches::Yes,
            Self::Key(_) => Reaches::No,
            Self::Everything => Reaches::Yes,
            Self::Some => Reaches::Perhaps,
            Self::Headers(arguments) => match_headers(arguments, headers),
        }
    }
}

/// As a headers exchange does. `all` (the default) needs each argument, `any` one of them.
fn match_headers(arguments: &Map<String, Value>, headers: &Headers) -> Reaches {
    let how = arguments.get(X_MATCH).and_then(Value::as_str).unwrap_or("all");
    let with_x = how.ends_with("-with-x");
    let counts = |name: &str| name != X_MATCH && (with_x || !name.starts_with("x-"));
    let matched = arguments.iter().filter(|(name, _)| counts(name)).map(|(name, wanted)| {
        match headers.get(name) {
            None => Reaches::Perhaps,
            // Without a value, the header only has to be there.
            Some(_) if wanted.is_null() => Reaches::Yes,
            Some(value) if value == wanted => Reaches::Yes,
            Some(_) => Reaches::No,
        }
    });
    if how.starts_with("any") {
        matched.max().unwrap_or(Reaches::No)
    } else {
        matched.min().unwrap_or(Reaches::Yes)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn binding(destination: &str, routing_key: &str, arguments: Value) -> Binding {
        let (kind, name) = destination.split_once(' ').unwrap();
        let Value::Object(arguments) = arguments else { panic!("{arguments}") };
        Binding {
            destination: name.to_owned(),
            destination_type: kind.to_owned(),
            routing_key: routing_key.to_owned(),
            arguments,
        }
    }

    fn topic(keys: &[&str]) -> Bindings {
        let mut bindings = Bindings::of("events");
        let to_mail = keys.iter().map(|key| binding("queue mail", key, json!({}))).collect();
        bindings.follow("events", "topic", to_mail);
        bindings
    }

    #[test]
    fn a_queue_gets_all_keys_of_a_pattern_or_one_is_named_that_it_misses() {
        let misses = |key: &str| Coverage::Misses(key.to_owned());
        for (keys, pattern, coverage) in [
            (&["order.*"][..], "order.*", Coverage::All),
            (&["order.#"], "order.*", Coverage::All),
            (&["#"], "order.*", Coverage::All),
            (&["#.#"], "order.#", Coverage::All),
            (&["*.new"], "order.new", Coverage::All),
            (&["order.*"], "order.#", misses("order")),
            (&["order.*", "order", "order.*.#"], "order.#", Coverage::All),
            (&["order.new"], "order.*", misses("order.x")),
            (&["shop.*"], "order.*", misses("order.shop")),
            (&["order.new", "order.changed"], "order.new", Coverage::All),
            (&["order.x"], "order.*", misses("order.order")),
            (&["*"], "order.new", misses("order.new")),
            (&[], "order.new", misses("order.new")),
            (&["#.new", "#.changed"], "#", misses("changed.x")),
        ] {
            let found = topic(keys).cover(pattern, "mail");
            match (&found, &coverage) {
                // Any one that is missed will do.
                (Coverage::Misses(key), Coverage::Misses(_)) => {
                    assert!(Pattern::topic(pattern).matches(key), "{keys:?} {pattern}: {key}");
                    assert!(!keys.iter().any(|own| Pattern::topic(own).matches(key)), "{keys:?}: {key}");
                }
                _ => assert_eq!(found, coverage, "{keys:?} {pattern}"),
            }
        }
        assert_eq!(topic(&["#"]).cover("order.*", "stock"), misses("order.x"));
    }

    #[test]
    fn patterns_of_many_words_end() {
        let keys: Vec<String> = (0..12).map(|n| format!("#.a{}.b.#", ".*".repeat(n))).collect();
        let keys: Vec<&str> = keys.iter().map(String::as_str).collect();
        let found = topic(&keys).cover("#.a.#.b.#.c.#.a.#", "mail");
        assert!(matches!(found, Coverage::TooMany | Coverage::Misses(_)), "{found:?}");
    }

    #[test]
    fn exchanges_behind_the_exchange_take_what_each_binding_on_the_way_takes() {
        let mut bindings = Bindings::of("events");
        let behind = vec![
            binding("exchange orders", "order.*", json!({})),
            binding("exchange by_aggregate", "#", json!({})),
            binding("exchange ring", "#", json!({})),
        ];
        bindings.follow("events", "topic", behind);
        assert_eq!(bindings.next_exchange().as_deref(), Some("by_aggregate"));
        let order = json!({"x-match": "all", "aggregate_type": "order"});
        let by_aggregate = vec![
            binding("queue stock", "", order),
            binding("queue all", "", json!({})),
            binding("queue none", "", json!({"x-match": "any"})),
            binding("queue eu", "", json!({"aggregate_type": "order", "region": "eu"})),
            // Round in a circle.
            binding("exchange events", "", json!({})),
        ];
        bindings.follow("by_aggregate", "headers", by_aggregate);
        bindings.follow("orders", "fanout", vec![binding("queue mail", "", json!({}))]);
        bindings.follow("ring", "x-consistent-hash", vec![binding("queue part", "1", json!({}))]);
        assert_eq!(bindings.next_exchange(), None);

        for (queue, pattern, coverage) in [
            ("mail", "order.*", Coverage::All),
            ("mail", "shop.new", Coverage::Misses("shop.new".to_owned())),
            ("stock", "order.*", Coverage::Perhaps),
            ("all", "#", Coverage::All),
            ("none", "order.new", Coverage::Misses("order.new".to_owned())),
            ("part", "order.new", Coverage::Perhaps),
        ] {
            assert_eq!(bindings.cover(pattern, queue), coverage, "{queue} {pattern}");
        }
        let of = |type_: &str| Headers::from([("aggregate_type".to_owned(), json!(type_))]);
        let reached = |key: &str, type_: &str| -> String {
            let headers = of(type_);
            let queues = bindings.queues(key, &headers);
            let named: Vec<String> = queues.iter().map(|(queue, is)| format!("{queue} {is:?}")).collect();
            named.join(", ")
        };
        assert_eq!(reached("order.new", "order"), "all Yes, eu Perhaps, mail Yes, part Perhaps, stock Yes");
        assert_eq!(reached("shop.new", "shop"), "all Yes, part Perhaps");
    }
}
