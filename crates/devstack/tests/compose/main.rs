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

mod image;
mod services;
mod yaml;

use services::Services;
use yaml::{list, parse, seconds, text};

const OWN_IMAGE: &str = "person-score:local";

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
    ("  pull_policy: never", "  build: { context: .., dockerfile: deploy/Dockerfile }", "other services build beside it"),
    ("pull_policy: never", "pull_policy: missing", "asks a registry for person-score:local"),
    ("      image: { condition: service_completed_successfully }\n", "", "person-relay: may start before person-score:local is built"),
    ("\"bash\", \"-c\", \"exec 3<>/dev/tcp/127.0.0.1/5672\"", "\"rabbitmq-diagnostics\", \"ping\"", "rabbitmq: its health check may make the node's cookie, as root"),
    ("image: postgres:17.6", "image: postgres:latest", "the image postgres:latest is not pinned"),
    ("image: traefik:v3.5", "image: traefik", "the image traefik is not pinned"),
    ("127.0.0.1:15672:15672", "15672:15672", "rabbitmq: publishes 15672:15672, which nobody expects"),
    ("UNROUTABLE: hold,score.*=drop", "UNROUTABLE: hold", "score-relay: nobody follows score.*, so it would wait for ever"),
    ("networks: [edge, score]", "networks: [edge, person]", "score-api: score-db is on none of its networks"),
    ("networks: [score]\n    environment:\n      POSTGRES_DB", "networks: [score, person]\n    environment:\n      POSTGRES_DB", "the two databases share the network person"),
    ("networks: [edge, score]", "networks: [edges, score]", "score-api: uses the network edges, which is not declared"),
    ("SCORE_API_PASSWORD: ${SCORE_API_PASSWORD", "SCORE_API_PASSWORD: ${SCORE_PASSWORD", "score-api: its password is not the one that score-db gives score_api"),
    ("LOGIN_ROLES: person_api outbox_relay", "LOGIN_ROLES: person_api", "person-relay: person-db has no role outbox_relay"),
    ("amqp://score_projector:", "amqp://events:", "score-projector: rabbitmq has no role events"),
    ("OUTBOX_RELAY_PERSON_PASSWORD: ${PERSON_RELAY_AMQP", "OUTBOX_RELAY_PERSON_PASSWORD: ${RELAY_AMQP", "person-relay: its password is not the one that rabbitmq gives outbox_relay_person"),
    ("SOURCE: person=", "SOURCE: person:", "score-projector: `score-projector run` does not take its settings"),
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
    let mut check = |problems: Vec<String>, mistake: &str, expected: &str| {
        if !problems.iter().any(|problem| problem.contains(expected)) {
            unseen.push(format!("{mistake:?}: expected {expected:?}, got {problems:#?}"));
        }
    };
    for (right, wrong, expected) in MISTAKES {
        let mut deploy = Deploy::read();
        assert!(deploy.compose.contains(right), "{right:?} is not in compose.yml any more");
        deploy.compose = deploy.compose.replace(right, wrong);
        check(deploy.problems(), wrong, expected);
    }
    for (right, wrong, expected) in DOCKERFILE_MISTAKES {
        let mut deploy = Deploy::read();
        assert!(deploy.dockerfile.contains(right), "{right:?} is not in the Dockerfile any more");
        deploy.dockerfile = deploy.dockerfile.replace(right, wrong);
        check(deploy.of_the_image(), wrong, expected);
    }
    let mut deploy = Deploy::read();
    for line in deploy.ignored.clone().lines().filter(|line| line.starts_with('!')) {
        deploy.ignored = Deploy::read().ignored.replace(&format!("{line}\n"), "");
        check(
            deploy.of_the_image(),
            line,
            &format!("the build does not see {}", line.trim_start_matches('!')),
        );
    }
    assert!(unseen.is_empty(), "mistakes that nobody would notice:\n{}", unseen.join("\n"));
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().nth(2).unwrap().to_owned()
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
            services.built(name, service, &mut problems);
            if let Some((program, arguments)) = command(service) {
                takes(program, &arguments, service, &mut problems);
                services.accounts(&arguments, service, &mut problems);
            }
        }
        "compose.yml".clone_into(&mut problems.about);
        services.apart(&mut problems);
        "traefik/dynamic.yml".clone_into(&mut problems.about);
        services.routed(&parse(&self.routes), &mut problems);
        problems.found.extend(self.of_the_image());
        problems.found
    }

    fn of_the_image(&self) -> Vec<String> {
        let mut problems = Problems { about: "Dockerfile".to_owned(), ..Problems::default() };
        self.image(&mut problems);
        problems.found
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
        let pinned = tag.contains(|c: char| c.is_ascii_digit()) || image == OWN_IMAGE;
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
    // Erlang's tools make the cookie when there is none, and a node cannot read root's.
    let erlang = list(&service["healthcheck"]["test"]).iter().any(|word| word.contains("rabbitmq"));
    problems.unless(!erlang, || "its health check may make the node's cookie, as root".into());
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
            let there = root().join("deploy").join(from).exists();
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
    if arguments == ["--version"] {
        return;
    }
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

/// The program and its arguments. Other images bring their own.
fn command(service: &Value) -> Option<(&str, Vec<&str>)> {
    if service["image"] != OWN_IMAGE {
        return None;
    }
    let words = list(&service["command"]);
    let (program, arguments) = words.split_first()?;
    Some((program, arguments.to_vec()))
}

/// Whether it does its work and ends.
fn ends(service: &Value) -> bool {
    let on_failure = text(&service["restart"]).starts_with("on-failure");
    on_failure
        || command(service).is_some_and(|(_, arguments)| ["migrate", "--version"].contains(&arguments[0]))
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
