//! Holds `deploy/` against the programs and against itself: no container engine is needed to see that
//! a variable is misspelled, a command does not exist or a health check asks nobody.

#![expect(clippy::unwrap_used, reason = "a panic in a test is the report")]

use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
    time::Duration,
};

use serde_json::Value;
use yaml_rust2::{Yaml, YamlLoader};

const PROGRAMS: [&str; 4] = ["person-api", "outbox-relay", "score-projector", "score-api"];

/// Everything that may be reached from outside, and who answers there.
const PUBLISHED: [(&str, &str); 3] = [
    ("127.0.0.1:80:8000", "traefik"),
    ("127.0.0.1:8080:8080", "traefik"),
    ("127.0.0.1:15672:15672", "rabbitmq"),
];

#[test]
fn deploy_fits_the_programs() {
    let problems = Deploy::read().problems();
    assert!(problems.is_empty(), "deploy/ is wrong:\n{}", problems.join("\n"));
}

/// Mistakes that somebody could make in compose.yml: what is right, what is wrong, and what is said.
#[rustfmt::skip]
const MISTAKES: &[(&str, &str, &str)] = &[
    ("LOG_FORMAT: json", "LOG_FORMATS: json", "score-api: the program knows no variable LOG_FORMATS"),
    ("LOG_FORMAT: json", "LOG_FORMAT: xml", "score-api: `score-api run` does not take its settings"),
    ("hold,score.*=drop", "hold,score.*=drop,x=lose", "score-relay: `outbox-relay run` does not take its settings"),
    ("[score-api, run]", "[score-api, walk]", "score-api: `score-api walk` is no command"),
    ("--grant-api", "--grant-apis", "is no command"),
    ("\"score-api\", \"health\"", "\"score-api\", \"healthy\"", "score-api: `score-api healthy` is no command"),
    ("\"score-api\", \"health\"", "\"person-api\", \"health\"", "score-api: `person-api health` asks another program"),
    ("[score-api, run]", "[scores-api, run]", "score-api: the image has no program scores-api"),
    ("person-db: { condition", "persons-db: { condition", "person-migrate: depends on persons-db, which is no service"),
    ("score-migrate: { condition: service_completed_successfully }", "score-migrate: { condition: service_healthy }", "score-api: waits for what score-migrate never becomes"),
    ("test: [\"CMD\", \"outbox-relay\", \"health\"]", "retries: 7", "has no health check"),
    ("./postgres/roles.sh", "./postgres/role.sh", "./postgres/role.sh does not exist"),
    ("dockerfile: deploy/Dockerfile", "dockerfile: Dockerfile", "Dockerfile does not exist"),
    ("image: postgres:17.6", "image: postgres:latest", "the image postgres:latest is not pinned"),
    ("image: traefik:v3.5", "image: traefik", "the image traefik is not pinned"),
    ("127.0.0.1:15672:15672", "15672:15672", "rabbitmq: publishes 15672:15672, which nobody expects"),
    ("UNROUTABLE: hold,score.*=drop", "UNROUTABLE: hold", "score-relay: nobody follows score.*, so it would wait for ever"),
    ("networks: [edge, score]", "networks: [edge, person]", "score-api: score-db is on none of its networks"),
    ("networks: [score]\n    environment:\n      POSTGRES_DB", "networks: [score, person]\n    environment:\n      POSTGRES_DB", "the two databases share the network person"),
    ("networks: [edge, score]", "networks: [edges, score]", "score-api: uses the network edges, which is not declared"),
    ("SCORE_API_PASSWORD: ${SCORE_API_PASSWORD", "SCORE_API_PASSWORD: ${SCORE_PASSWORD", "score-api: its password is not the one that score-db gives score_api"),
    ("LOGIN_ROLES: person_api outbox_relay", "LOGIN_ROLES: person_api", "person-relay: person-db has no role outbox_relay"),
    ("--grant-api, score_api", "--grant-api, api", "score-migrate: nobody logs in as api"),
    ("stop_grace_period: 15s", "stop_grace_period: 5s", "score-api: is killed while it drains"),
    ("mem_limit: 1g", "cpus: 1", "rabbitmq: may use all of the memory"),
    ("LISTEN: 0.0.0.0:8001", "LISTEN: 0.0.0.0:8000", "Traefik asks score-api at 8001, where it does not listen"),
    ("LISTEN: 0.0.0.0:8001\n      ALLOW_ANONYMOUS: \"true\"", "LISTEN: 0.0.0.0:8001", "score-api: `score-api run` does not take its settings: score-api: LISTEN"),
    ("LISTEN: 0.0.0.0:8001", "LISTEN: 127.0.0.1:8001", "score-api: listens where no other container reaches it"),
    ("\n  score-db:\n  rabbitmq:", "\n  score-db:", "rabbitmq: uses the volume rabbitmq, which is not declared"),
];

/// The same for the Dockerfile.
#[rustfmt::skip]
const DOCKERFILE_MISTAKES: &[(&str, &str, &str)] = &[
    ("--package score-api", "", "the Dockerfile does not build score-api"),
    ("target/release/score-api", "", "the Dockerfile does not install score-api"),
    ("COPY --from=build", "COPY", "the Dockerfile copies nothing"),
    ("debian:12.12-slim", "debian", "the image debian is not pinned"),
    ("USER 65532:65532", "", "the image runs as root"),
    ("cargo build --release --locked", "cargo build --release", "the Dockerfile does not build with --locked"),
];

#[test]
fn every_mistake_is_seen() {
    let mut unseen = Vec::new();
    let mut check = |broken: &Deploy, mistake: &str, expected: &str| {
        let problems = broken.problems();
        if !problems.iter().any(|problem| problem.contains(expected)) {
            unseen.push(format!("{mistake:?}: expected {expected:?}, got {problems:#?}"));
        }
    };
    for (right, wrong, expected) in MISTAKES {
        let mut deploy = Deploy::read();
        assert!(deploy.compose.contains(right), "{right:?} is not in compose.yml any more");
        deploy.compose = deploy.compose.replace(right, wrong);
        check(&deploy, wrong, expected);
    }
    for (right, wrong, expected) in DOCKERFILE_MISTAKES {
        let mut deploy = Deploy::read();
        assert!(deploy.dockerfile.contains(right), "{right:?} is not in the Dockerfile any more");
        deploy.dockerfile = deploy.dockerfile.replace(right, wrong);
        check(&deploy, wrong, expected);
    }
    let mut deploy = Deploy::read();
    deploy.ignored = deploy.ignored.replace("!inbox\n", "");
    check(&deploy, "a folder that is not sent", "the build does not see inbox");
    assert!(unseen.is_empty(), "mistakes that nobody would notice:\n{}", unseen.join("\n"));
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned()
}

/// The files of `deploy/`.
struct Deploy {
    compose: String,
    dockerfile: String,
    ignored: String,
    routes: String,
}

impl Deploy {
    fn read() -> Self {
        let read = |name: &str| std::fs::read_to_string(root().join("deploy").join(name)).unwrap();
        Self {
            compose: read("compose.yml"),
            dockerfile: read("Dockerfile"),
            ignored: read("Dockerfile.dockerignore"),
            routes: read("traefik/dynamic.yml"),
        }
    }

    fn problems(&self) -> Vec<String> {
        let compose = parse(&self.compose);
        let services = Services(compose["services"].as_object().unwrap());
        let mut problems = Problems::default();
        for (name, service) in services.0 {
            problems.about.clone_from(name);
            shape(service, &compose, &mut problems);
            services.order(service, &mut problems);
            if let Some((program, arguments)) = command(service) {
                takes(program, &arguments, service, &mut problems);
                services.accounts(&arguments, service, &mut problems);
            }
        }
        "compose.yml".clone_into(&mut problems.about);
        services.apart(&mut problems);
        "traefik/dynamic.yml".clone_into(&mut problems.about);
        services.routed(&parse(&self.routes), &mut problems);
        "Dockerfile".clone_into(&mut problems.about);
        self.image(&mut problems);
        problems.found
    }

    /// The Dockerfile makes what the containers run.
    fn image(&self, problems: &mut Problems) {
        let lines = || self.dockerfile.lines().map(str::trim).filter(|line| !line.starts_with('#'));
        for image in lines().filter_map(|line| line.strip_prefix("FROM ")) {
            problems.pinned(image.split(' ').next().unwrap());
        }
        let words: Vec<_> = lines().flat_map(str::split_whitespace).collect();
        for program in PROGRAMS {
            let built = words.windows(2).any(|pair| pair == ["--package", program]);
            problems.unless(built, || format!("the Dockerfile does not build {program}"));
            let installed = words.contains(&format!("target/release/{program}").as_str());
            problems.unless(installed, || format!("the Dockerfile does not install {program}"));
        }
        problems.unless(words.contains(&"--locked"), || "the Dockerfile does not build with --locked".into());
        problems.unless(words.contains(&"--from=build"), || "the Dockerfile copies nothing".into());
        let user = lines().filter_map(|line| line.strip_prefix("USER ")).next_back();
        let root_user = user.is_none_or(|user| user.starts_with("root") || user.starts_with('0'));
        problems.unless(!root_user, || "the image runs as root".into());

        let manifest = std::fs::read_to_string(root().join("Cargo.toml")).unwrap();
        let members = manifest.split("members = [").nth(1).unwrap().split(']').next().unwrap();
        let members = members.lines().filter_map(|line| line.trim().strip_prefix('"')?.strip_suffix("\","));
        for path in members.chain(["migrations", "Cargo.toml", "Cargo.lock"]) {
            let seen = self.ignored.lines().any(|line| line == format!("!{path}"));
            problems.unless(seen, || format!("the build does not see {path}"));
        }
    }
}

/// What is wrong, and with which part.
#[derive(Default)]
struct Problems {
    about: String,
    found: Vec<String>,
}

impl Problems {
    fn unless(&mut self, right: bool, problem: impl FnOnce() -> String) {
        if !right {
            self.found.push(format!("{}: {}", self.about, problem()));
        }
    }

    fn pinned(&mut self, image: &str) {
        let tag = image.split_once(':').map(|(_, tag)| tag).unwrap_or_default();
        let pinned = tag.contains(|c: char| c.is_ascii_digit()) || image == "person-score:local";
        self.unless(pinned, || format!("the image {image} is not pinned"));
    }
}

/// What holds for every container, and that what it refers to exists.
fn shape(service: &Value, compose: &Value, problems: &mut Problems) {
    problems.pinned(text(&service["image"]));
    problems.unless(service["mem_limit"].is_string(), || "may use all of the memory".into());
    problems.unless(service["restart"].is_string(), || "is not started again".into());
    let checked = service["healthcheck"]["test"].is_array();
    problems.unless(checked || ends(service), || "has no health check".into());
    for network in list(&service["networks"]) {
        let declared = compose["networks"].get(network).is_some();
        problems.unless(declared, || format!("uses the network {network}, which is not declared"));
    }
    for port in list(&service["ports"]) {
        let expected = PUBLISHED.contains(&(port, problems.about.as_str()));
        problems.unless(expected, || format!("publishes {port}, which nobody expects"));
    }
    for volume in list(&service["volumes"]) {
        let from = volume.split(':').next().unwrap();
        if from.starts_with('.') {
            let there = root().join("deploy").join(from).is_file();
            problems.unless(there, || format!("{from} does not exist"));
        } else {
            let declared = compose["volumes"].get(from).is_some();
            problems.unless(declared, || format!("uses the volume {from}, which is not declared"));
        }
    }
    if let Some(dockerfile) = service["build"]["dockerfile"].as_str() {
        let context = root().join("deploy").join(text(&service["build"]["context"]));
        let there = context.join(dockerfile).is_file() && context.join("Cargo.lock").is_file();
        problems.unless(there, || format!("{dockerfile} does not exist"));
    }
}

/// The program has the command, and the command takes the settings.
fn takes(program: &str, arguments: &[&str], service: &Value, problems: &mut Problems) {
    let line = format!("{program} {}", arguments.join(" "));
    let Some(help) = help(program, arguments, &line, problems) else { return };
    if let ["CMD", asked, asks @ ..] = &list(&service["healthcheck"]["test"])[..] {
        let line = format!("{asked} {}", asks.join(" "));
        problems.unless(*asked == program, || format!("`{line}` asks another program"));
        let _ = self::help(asked, asks, &line, problems);
    }

    let environment: BTreeMap<&str, &str> = service["environment"]
        .as_object()
        .into_iter()
        .flatten()
        .map(|(name, value)| (name.as_str(), text(value)))
        .collect();
    let known = known_variables(&help);
    for name in environment.keys() {
        problems.unless(known.contains(name), || format!("the program knows no variable {name}"));
    }
    if let Some(listen) = environment.get("LISTEN") {
        let reached = listen.parse().is_ok_and(|address: SocketAddr| address.ip().is_unspecified());
        problems.unless(reached, || "listens where no other container reaches it".into());
        let (drain, grace) =
            (seconds(&service["environment"]["DRAIN_TIMEOUT"]), seconds(&service["stop_grace_period"]));
        problems.unless(drain.is_some() && drain < grace, || "is killed while it drains".into());
    }
    if line == "outbox-relay run" && environment["DATABASE_URL"].ends_with("/score") {
        let policy = environment.get("UNROUTABLE").copied().unwrap_or_default();
        let drops = policy.split(',').any(|rule| rule == "score.*=drop");
        problems.unless(drops, || "nobody follows score.*, so it would wait for ever".into());
    }

    // Without a database it has to end, and with that complaint alone: then it took everything else.
    let mut started = Command::new(binary(program));
    started.args(arguments).env_clear().envs(&environment).env_remove("DATABASE_URL");
    if environment.contains_key("LISTEN") {
        started.env("LISTEN", "0.0.0.0:0");
    }
    let output = run(started);
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    let taken = error.starts_with(&format!("{program}: DATABASE_URL"));
    problems.unless(taken, || format!("`{line}` does not take its settings: {}", error.trim()));
}

struct Services<'a>(&'a serde_json::Map<String, Value>);

impl Services<'_> {
    /// What it waits for exists and can come true.
    fn order(&self, service: &Value, problems: &mut Problems) {
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

    /// Whom it logs in as exists there, with that password, and can be reached.
    fn accounts(&self, arguments: &[&str], service: &Value, problems: &mut Problems) {
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
                ("AMQP_URL", _) => (given["RABBITMQ_DEFAULT_USER"] == role, &given["RABBITMQ_DEFAULT_PASS"]),
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
    fn apart(&self, problems: &mut Problems) {
        let networks = |name: &str| list(&self.0[name]["networks"]).into_iter().collect::<BTreeSet<_>>();
        for network in networks("person-db").intersection(&networks("score-db")) {
            problems.unless(false, || format!("the two databases share the network {network}"));
        }
    }

    /// Traefik asks the programs where they listen.
    fn routed(&self, routes: &Value, problems: &mut Problems) {
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

/// The program and its arguments. Other images bring their own.
fn command(service: &Value) -> Option<(&str, Vec<&str>)> {
    let words = list(&service["command"]);
    let (program, arguments) = words.split_first()?;
    Some((program, arguments.to_vec()))
}

/// Whether it does its work and ends.
fn ends(service: &Value) -> bool {
    command(service).is_some_and(|(_, arguments)| arguments[0] == "migrate")
}

/// What `program arguments --help` prints, when there is such a command.
fn help(program: &str, arguments: &[&str], line: &str, problems: &mut Problems) -> Option<String> {
    if !PROGRAMS.contains(&program) {
        problems.unless(false, || format!("the image has no program {program}"));
        return None;
    }
    let mut asked = Command::new(binary(program));
    asked.args(arguments).arg("--help").env_clear();
    let output = run(asked);
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    problems.unless(output.status.success(), || format!("`{line}` is no command: {}", error.trim()));
    output.status.success().then(|| String::from_utf8(output.stdout).unwrap())
}

/// The variables that a help text names. A secret has no flag: it is named beside that of its file.
fn known_variables(help: &str) -> BTreeSet<&str> {
    let flags = help.split("[env: ").skip(1).filter_map(|rest| rest.split(['=', ']']).next());
    let mut known: BTreeSet<_> = flags.collect();
    let secrets: Vec<_> = known
        .iter()
        .filter_map(|name| name.strip_suffix("_FILE"))
        .filter(|name| help.contains(&format!("`{name}`")))
        .collect();
    known.extend(secrets);
    known
}

/// Beside this test's own binary.
fn binary(program: &str) -> PathBuf {
    let test = std::env::current_exe().unwrap();
    let path = test.parent().unwrap().parent().unwrap().join(program);
    assert!(path.is_file(), "{program} is not built: run `cargo build --workspace`");
    path
}

/// Runs to the end, which has to come soon.
fn run(mut command: Command) -> Output {
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    let mut tries = 1_000;
    while child.try_wait().unwrap().is_none() {
        std::thread::sleep(Duration::from_millis(5));
        tries -= 1;
        if tries == 0 {
            child.kill().unwrap();
        }
    }
    child.wait_with_output().unwrap()
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_default()
}

fn list(value: &Value) -> Vec<&str> {
    value.as_array().into_iter().flatten().filter_map(Value::as_str).collect()
}

fn seconds(value: &Value) -> Option<u64> {
    text(value).strip_suffix('s')?.parse().ok()
}

fn parse(yaml: &str) -> Value {
    json(&YamlLoader::load_from_str(yaml).unwrap()[0])
}

/// As JSON, with merge keys (`<<`) resolved, which the YAML reader leaves to its users.
fn json(yaml: &Yaml) -> Value {
    match yaml {
        Yaml::Array(all) => all.iter().map(json).collect(),
        Yaml::Hash(all) => {
            let mut object = serde_json::Map::new();
            let mut inherited = serde_json::Map::new();
            for (key, value) in all {
                match (key.as_str().unwrap(), json(value)) {
                    ("<<", Value::Object(merged)) => inherited.extend(merged),
                    (key, value) => drop(object.insert(key.to_owned(), value)),
                }
            }
            for (key, value) in inherited {
                object.entry(key).or_insert(value);
            }
            Value::Object(object)
        }
        Yaml::Boolean(value) => (*value).into(),
        Yaml::Integer(value) => (*value).into(),
        Yaml::Null => Value::Null,
        other => other.as_str().map_or_else(|| format!("{other:?}"), str::to_owned).into(),
    }
}
