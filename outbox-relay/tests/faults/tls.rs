//! Both connections encrypted, each side proving who it is.

use std::{fmt::Write, fs, path::Path};

use devstack::{
    folder::Folder,
    ports,
    postgres::Postgres,
    rabbitmq::RabbitMq,
    testing::Place,
    tls::{Authority, Certificate},
};
use reqwest::Method;
use tokio::process::Command;
use tokio_util::sync::CancellationToken;

use crate::stack::{BROKER_PASSWORD, Relay, Stack, Subscriber, eventually, output};

/// The same user and name at another address, with a query.
fn at(url: &str, scheme: &str, host: &str, port: u16, query: &str) -> String {
    let (_, rest) = url.split_once("://").unwrap();
    let (user, rest) = rest.rsplit_once('@').unwrap();
    let (_, name) = rest.split_once('/').unwrap();
    format!("{scheme}://{user}@{host}:{port}/{name}?{query}")
}

/// Verified on both sides it publishes; anything less is refused, for a reason that can be read.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "slow: make test-faults"]
async fn both_connections_are_encrypted_and_verified() {
    let folder = Folder::temporary().unwrap();
    let authority = Authority::new(&folder.part("tls").unwrap()).unwrap();
    let stranger = Authority::new(&folder.part("stranger").unwrap()).unwrap();
    let (server, client) = (authority.issue("localhost").unwrap(), authority.issue("relay").unwrap());
    let forged = stranger.issue("relay").unwrap();

    let (port, amqps) = (ports::free(), ports::free());
    let mut postgres = Postgres::new(&folder, port, false).await.unwrap();
    postgres.encrypt(&server).unwrap();
    let management = ports::free();
    let mut rabbitmq = RabbitMq::new(&folder, ports::free(), management).unwrap();
    rabbitmq.encrypt(amqps, &server).unwrap();
    postgres.start().await.unwrap();
    rabbitmq.start().await.unwrap();
    let place =
        Place { postgres: postgres.url(), amqp: rabbitmq.url(), management: rabbitmq.management_url() };
    let stack = Stack::on(place, "faults_tls").await;
    stack.declare_exchange(lapin::ExchangeKind::Topic).await;
    let mut subscriber = stack.subscribe("#").await;
    // As an operator gives the relay its user, twice.
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/permissions/rabbitmq.sh");
    let password = folder.part("relay").unwrap().join("password");
    fs::write(&password, BROKER_PASSWORD).unwrap();
    stack.manage(Method::DELETE, &format!("users/{}", stack.vhost), None).await;
    for _ in 0..2 {
        rabbitmq.script(&script, &[&stack.vhost, &stack.vhost, "relay"], &password).await.unwrap();
    }

    let database = |host: &str, authority: &Certificate| {
        let query = format!("sslmode=verify-full&sslrootcert={}", authority.authority.display());
        at(&stack.database_url, "postgres", host, port, &query)
    };
    let broker = |host: &str, authority: &Certificate, shown: Option<&Certificate>| {
        let mut query = format!("cacertfile={}", authority.authority.display());
        if let Some(shown) = shown {
            let _never =
                write!(query, "&certfile={}&keyfile={}", shown.certificate.display(), shown.key.display());
        }
        at(&stack.amqp_url, "amqps", host, amqps, &query)
    };
    let right = (database("localhost", &server), broker("localhost", &server, Some(&client)));
    let run = |database: &str, broker: &str| {
        let mut run = stack.command("run");
        run.env("DATABASE_URL", database).env("AMQP_URL", broker);
        run
    };

    let mut relay = Relay::ready(&mut run(&right.0, &right.1)).await;
    stack.append(0..1, 1, &["thing.changed"]).await;
    subscriber.until(|messages| messages.len() == 1).await;
    let sql = "SELECT count(*), bool_and(ssl) FROM pg_stat_activity JOIN pg_stat_ssl USING (pid)
               WHERE application_name LIKE 'outbox-relay%'";
    let (sessions, encrypted): (i64, bool) = sqlx::query_as(sql).fetch_one(&stack.admin).await.unwrap();
    assert!(sessions > 0 && encrypted, "{sessions} sessions, encrypted: {encrypted}");
    let connections = eventually("RabbitMQ lists the relay's connection", async || {
        let user = &stack.vhost;
        let all = stack.manage(Method::GET, "connections", None).await;
        let relays = all.as_array()?.iter().filter(|connection| connection["user"] == user.as_str());
        let encrypted: Vec<bool> = relays.filter_map(|connection| connection["ssl"].as_bool()).collect();
        (!encrypted.is_empty()).then_some(encrypted)
    })
    .await;
    assert!(connections.iter().all(|encrypted| *encrypted), "{connections:?}");
    let doctor =
        output(stack.command("doctor").env("DATABASE_URL", &right.0).env("AMQP_URL", &right.1)).await;
    assert!(doctor.starts_with("exit code: 0"), "{doctor}");
    assert!(relay.terminate().await.success());

    let (forged_name, other_name) = ("invalid peer certificate: BadSignature", "not valid for name");
    for (what, database, broker, says) in [
        ("another authority's database", &database("localhost", &forged), &right.1, forged_name),
        ("a database of another name", &database("127.0.0.1", &server), &right.1, other_name),
        ("another authority's broker", &right.0, &broker("localhost", &forged, Some(&client)), forged_name),
        ("a broker of another name", &right.0, &broker("127.0.0.1", &server, Some(&client)), other_name),
        ("nothing shown", &right.0, &broker("localhost", &server, None), "CertificateRequired"),
        ("a stranger shown", &right.0, &broker("localhost", &server, Some(&forged)), "UnknownCA"),
    ] {
        let mut relay = Relay::start(&mut run(database, broker)).await;
        let told = eventually(&format!("{what}: /ready says {says}"), async || {
            let (status, body) = relay.get("ready").await?;
            (status == 503 && body.contains(says)).then_some(body)
        })
        .await;
        println!("{what}: {told}");
        assert!(relay.terminate().await.success());
    }
    let own = [stack.vhost.as_str(), "relay", "relay"];
    rabbitmq.script(&script, &own, &password).await.unwrap();
    let url = broker("localhost", &server, Some(&client));
    let external = |user: &str| {
        let user = format!("//{user}:");
        format!("{}&auth_mechanism=external", url.replace(&format!("//{}:", stack.vhost), &user))
    };
    under_the_certificates_name(&stack, &mut subscriber, &run, &right.0, external).await;
    drop(stack);
    rabbitmq.stop(&CancellationToken::new()).await;
    postgres.stop(&CancellationToken::new()).await;
}

/// By a certificate alone the broker takes the user from there, whatever the URL says: under a name that is not the
/// broker's nothing is published, and nothing set aside.
async fn under_the_certificates_name(
    stack: &Stack,
    subscriber: &mut Subscriber,
    run: &impl Fn(&str, &str) -> Command,
    database: &str,
    external: impl Fn(&str) -> String,
) {
    let mut named = Relay::ready(&mut run(database, &external("relay"))).await;
    stack.append(1..2, 1, &["thing.changed"]).await;
    subscriber.until(|messages| messages.len() == 2).await;
    let user = subscriber.messages[1].properties.user_id().clone();
    assert_eq!(user.map(|user| user.to_string()).as_deref(), Some("relay"));
    assert!(named.terminate().await.success());

    let mut misnamed = Relay::start(&mut run(database, &external("somebody"))).await;
    stack.append(2..9, 1, &["thing.changed"]).await;
    misnamed.waits("by another name than \"somebody\"").await;
    let sql = "SELECT (SELECT low_water FROM outbox.relay), (SELECT count(*) FROM outbox.parked)";
    let (published, parked): (i64, i64) = sqlx::query_as(sql).fetch_one(&stack.admin).await.unwrap();
    assert_eq!((published, parked), (2, 0));
    let mut doctor = stack.command("doctor");
    let said = output(doctor.env("DATABASE_URL", database).env("AMQP_URL", external("somebody"))).await;
    assert!(said.contains("rabbitmqctl list_connections"), "{said}");
    assert!(misnamed.terminate().await.success());

    let mut named = Relay::ready(&mut run(database, &external("relay"))).await;
    subscriber.until(|messages| messages.len() == 9).await;
    assert!(named.terminate().await.success());
}
