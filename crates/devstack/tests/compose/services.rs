//! What the services of compose.yml have to do with each other.

use std::collections::BTreeSet;

use serde_json::Value;

use super::{
    OWN_IMAGE, Problems, ends,
    yaml::{list, text},
};

pub(super) struct Services<'a>(pub(super) &'a serde_json::Map<String, Value>);

impl Services<'_> {
    /// What it waits for exists and can come true.
    pub(super) fn order(&self, service: &Value, problems: &mut Problems) {
        for (other, wait) in service["depends_on"].as_object().into_iter().flatten() {
            let Some(target) = self.0.get(other) else {
                problems.unless(false, || format!("depends on {other}, which is no service"));
                continue;
            };
            let possible = match text(&wait["condition"]) {
                "service_healthy" => target["healthcheck"].is_object(),
                "service_completed_successfully" => ends(target),
                _ => false,
            };
            problems.unless(possible, || format!("waits for what {other} never becomes"));
        }
    }

    /// One service alone builds the image, and whatever runs it waits for that one: several builds of one tag at
    /// the same time fail on the containerd image store.
    pub(super) fn built(&self, name: &str, service: &Value, problems: &mut Problems) {
        if service["image"] != OWN_IMAGE {
            return;
        }
        if service["build"].is_object() {
            let others = self.0.values().filter(|other| other["build"].is_object()).count() - 1;
            problems.unless(others == 0, || format!("{others} other services build beside it"));
            return;
        }
        let never = service["pull_policy"] == "never";
        problems.unless(never, || format!("asks a registry for {OWN_IMAGE}"));
        problems.unless(self.after_build(name), || format!("may start before {OWN_IMAGE} is built"));
    }

    /// Whether a service waits for the build, itself or through what it waits for.
    fn after_build(&self, name: &str) -> bool {
        self.0.get(name).is_some_and(|service| {
            let mut before =
                service["depends_on"].as_object().into_iter().flatten().map(|(before, _)| before);
            service["build"].is_object() || before.any(|before| self.after_build(before))
        })
    }

    /// Whom it logs in as exists there, with that password, and can be reached.
    pub(super) fn accounts(&self, arguments: &[&str], service: &Value, problems: &mut Problems) {
        for (variable, scheme) in [("DATABASE_URL", "postgres://"), ("AMQP_URL", "amqp://")] {
            let Some(url) = service["environment"][variable].as_str() else { continue };
            let (login, place) = url.strip_prefix(scheme).unwrap().rsplit_once('@').unwrap();
            let (role, password) = login.split_once(':').unwrap();
            let host = place.split([':', '/']).next().unwrap();
            let Some(server) = self.0.get(host) else {
                problems.unless(false, || format!("{host} is no service"));
                continue;
            };
            let networks = list(&server["networks"]);
            let near = list(&service["networks"]).iter().any(|network| networks.contains(network));
            problems.unless(near, || format!("{host} is on none of its networks"));

            let given = &server["environment"];
            let roles: Vec<_> = text(&given["LOGIN_ROLES"]).split(' ').collect();
            let (known, stored) = match (variable, role) {
                ("AMQP_URL", _) => {
                    let users =
                        self.0.get("broker-users").map_or(&Value::Null, |users| &users["environment"]);
                    let stored = &users[format!("{}_PASSWORD", role.to_uppercase())];
                    (stored.is_string(), stored)
                }
                (_, "postgres") => (true, &given["POSTGRES_PASSWORD"]),
                _ => (roles.contains(&role), &given[format!("{}_PASSWORD", role.to_uppercase())]),
            };
            problems.unless(known, || format!("{host} has no role {role}"));
            let right = text(stored) == password;
            problems.unless(right, || format!("its password is not the one that {host} gives {role}"));
            if variable == "DATABASE_URL" {
                for pair in arguments.windows(2).filter(|pair| pair[0].starts_with("--grant")) {
                    problems.unless(roles.contains(&pair[1]), || format!("nobody logs in as {}", pair[1]));
                }
            }
        }
    }

    /// The person side and the score side meet at the broker alone.
    pub(super) fn apart(&self, problems: &mut Problems) {
        let networks = |name: &str| list(&self.0[name]["networks"]).into_iter().collect::<BTreeSet<_>>();
        for network in networks("person-db").intersection(&networks("score-db")) {
            problems.unless(false, || format!("the two databases share the network {network}"));
        }
    }

    /// Traefik asks the programs where they listen.
    pub(super) fn routed(&self, routes: &Value, problems: &mut Problems) {
        let http = &routes["http"];
        for router in http["routers"].as_object().unwrap().values() {
            let service = text(&router["service"]);
            let known = service == "api@internal" || http["services"].get(service).is_some();
            problems.unless(known, || format!("routes to {service}, which is not declared"));
            for middleware in list(&router["middlewares"]) {
                let known = http["middlewares"].get(middleware).is_some();
                problems.unless(known, || format!("uses {middleware}, which is not declared"));
            }
        }
        for service in http["services"].as_object().unwrap().values() {
            let url = text(&service["loadBalancer"]["servers"][0]["url"]);
            let (host, port) = url.strip_prefix("http://").unwrap().split_once(':').unwrap();
            let listens = self.0.get(host).and_then(|s| s["environment"]["LISTEN"].as_str());
            let right = listens.is_some_and(|listen| listen.ends_with(&format!(":{port}")));
            problems.unless(right, || format!("Traefik asks {host} at {port}, where it does not listen"));
        }
    }
}
