//! What each program's user of RabbitMQ may do, and that it can do nothing else; and the script that makes them.

use std::{fmt::Write, fs, os::unix::fs::PermissionsExt, path::Path, process::Command};

use devstack::{
    folder::Folder,
    testing::{Place, virtual_host},
    users::Rights,
};
use lapin::{
    BasicProperties, Channel, Connection, ConnectionProperties, ErrorKind, ExchangeKind,
    options::{
        BasicConsumeOptions, BasicPublishOptions, ConfirmSelectOptions, ExchangeBindOptions,
        ExchangeDeclareOptions, ExchangeDeleteOptions, QueueBindOptions, QueueDeclareOptions,
        QueueDeleteOptions,
    },
    protocol::{AMQPErrorKind, AMQPSoftError},
    types::FieldTable,
};

const EXCHANGE: &str = "event_dispatcher";
const BY_AGGREGATE: &str = "event_dispatcher.by_aggregate";

/// Something that a user asks the broker for.
#[derive(Clone, Copy, Debug)]
enum Ask {
    Publish(&'static str),
    DeclareExchange(&'static str, ExchangeKindName),
    DeleteExchange(&'static str),
    DeclareQueue(&'static str),
    DeleteQueue(&'static str),
    Bind(&'static str, &'static str),
    BindExchange(&'static str, &'static str),
    Consume(&'static str),
}

/// `ExchangeKind` cannot be copied.
#[derive(Clone, Copy, Debug)]
enum ExchangeKindName {
    Topic,
    Headers,
    Fanout,
}

use Ask::{Bind, BindExchange, Consume, DeclareExchange, DeclareQueue, DeleteExchange, DeleteQueue, Publish};
use ExchangeKindName::{Fanout, Headers, Topic};

impl Ask {
    /// Whether the broker lets this channel have it. A refusal closes the channel.
    async fn granted(self, channel: &Channel) -> bool {
        let none = FieldTable::default;
        let done = match self {
            Publish(exchange) => {
                let publish = channel.basic_publish(
                    exchange.into(),
                    "any.key".into(),
                    BasicPublishOptions::default(),
                    b"{}",
                    BasicProperties::default(),
                );
                async { publish.await?.await.map(drop) }.await
            }
            DeclareExchange(name, kind) => {
                let kind = match kind {
                    Topic => ExchangeKind::Topic,
                    Headers => ExchangeKind::Headers,
                    Fanout => ExchangeKind::Fanout,
                };
                let options = ExchangeDeclareOptions { durable: true, ..Default::default() };
                channel.exchange_declare(name.into(), kind, options, none()).await
            }
            DeleteExchange(name) => {
                channel.exchange_delete(name.into(), ExchangeDeleteOptions::default()).await
            }
            DeclareQueue(name) => {
                let options = QueueDeclareOptions { durable: true, ..Default::default() };
                channel.queue_declare(name.into(), options, none()).await.map(drop)
            }
            DeleteQueue(name) => {
                channel.queue_delete(name.into(), QueueDeleteOptions::default()).await.map(drop)
            }
            Bind(queue, exchange) => {
                let options = QueueBindOptions::default();
                channel.queue_bind(queue.into(), exchange.into(), "#".into(), options, none()).await
            }
            BindExchange(to, from) => {
                let options = ExchangeBindOptions::default();
                channel.exchange_bind(to.into(), from.into(), "#".into(), options, none()).await
            }
            Consume(queue) => channel
                .basic_consume(queue.into(), "".into(), BasicConsumeOptions::default(), none())
                .await
                .map(drop),
        };
        match done {
            Ok(()) => true,
            Err(error) => match error.kind() {
                ErrorKind::ProtocolError(amqp)
                    if *amqp.kind() == AMQPErrorKind::Soft(AMQPSoftError::ACCESSREFUSED) =>
                {
                    false
                }
                _ => panic!("{self:?}: {error}"),
            },
        }
    }
}

/// Each program has what it needs, and is refused all else that is there.
#[tokio::test]
async fn each_user_may_do_what_its_program_needs() {
    let place = Place::around();
    let vhost = virtual_host("broker").await;
    let admin = Connection::connect(&vhost, ConnectionProperties::default()).await.unwrap();
    let channel = admin.create_channel().await.unwrap();
    for ask in [
        DeclareExchange(EXCHANGE, Topic),
        DeclareExchange("elsewhere", Topic),
        DeclareQueue("late.rebuild-2"),
        DeclareQueue("other"),
    ] {
        assert!(ask.granted(&channel).await);
    }
    let table: [(&str, Rights<'_>, &[Ask], &[Ask]); 4] = [
        (
            "relay",
            Rights::Relay,
            &[Publish(EXCHANGE)],
            &[
                Publish(""),
                Publish("elsewhere"),
                Publish(BY_AGGREGATE),
                DeclareExchange(EXCHANGE, Topic),
                DeleteExchange(EXCHANGE),
                DeclareQueue("mine"),
                Bind("other", EXCHANGE),
                Consume("other"),
                DeleteQueue("other"),
            ],
        ),
        (
            "subscriber",
            Rights::Subscriber("address-book.v1"),
            &[
                DeclareExchange(EXCHANGE, Topic),
                DeclareExchange(BY_AGGREGATE, Headers),
                BindExchange(BY_AGGREGATE, EXCHANGE),
                DeclareExchange("address-book.v1.dead", Fanout),
                DeclareQueue("address-book.v1.dead"),
                DeclareQueue("address-book.v1"),
                DeclareQueue("address-book.v1.rebuild-2"),
                Bind("address-book.v1", BY_AGGREGATE),
                Bind("address-book.v1.dead", "address-book.v1.dead"),
                Consume("address-book.v1"),
                Consume("address-book.v1.dead"),
            ],
            &[
                Publish(EXCHANGE),
                Publish(""),
                Consume("other"),
                Bind("other", EXCHANGE),
                DeleteQueue("other"),
                DeclareQueue("address-book"),
                DeclareQueue("address-bookXv1"),
                DeclareQueue("address-book.v10"),
                DeclareExchange("elsewhere", Topic),
            ],
        ),
        (
            "replay",
            Rights::Replay("late"),
            &[
                Publish(EXCHANGE),
                DeclareExchange("outbox-replay.1", Fanout),
                Bind("late.rebuild-2", "outbox-replay.1"),
                Publish("outbox-replay.1"),
                DeleteExchange("outbox-replay.1"),
            ],
            &[
                Publish(""),
                DeclareExchange(EXCHANGE, Topic),
                DeclareQueue("late"),
                Consume("late.rebuild-2"),
                Bind("other", EXCHANGE),
                DeleteQueue("other"),
            ],
        ),
        ("stranger", Rights::Subscriber("stranger"), &[], &[Publish(EXCHANGE), Consume("late.rebuild-2")]),
    ];
    for (program, rights, may, may_not) in table {
        let url = place.broker_user(&vhost, program, rights).await;
        let connection = Connection::connect(&url, ConnectionProperties::default()).await.unwrap();
        for (asks, granted) in [(may, true), (may_not, false)] {
            for ask in asks {
                let channel = connection.create_channel().await.unwrap();
                channel.confirm_select(ConfirmSelectOptions::default()).await.unwrap();
                assert_eq!(ask.granted(&channel).await, granted, "{program}: {ask:?}");
            }
        }
    }
}

/// Stands in for RabbitMQ 4's rabbitmqctl, which opens its standard input for `add_user NAME` and
/// `change_password NAME` alone, and only when nothing else stands on the line. With anything more it takes the
/// password that it was not given for an end (exit code 70).
const RABBITMQCTL: &str = r#"#!/bin/bash
input=
case "$1" in add_user|change_password) [ $# -eq 2 ] && input=$(cat) || exit 70 ;; esac
case "$*" in *add_user*|*change_password*) [ -n "$input" ] || exit 70 ;; esac
{ printf '%s' "$*"; [ -z "$input" ] || printf ' < %s' "$input"; echo; } >> "$CALLS"
case "$*" in *list_users*) printf 'user\ttags\nknown\t[administrator]\nknown.too\t[]\n' ;; esac
exit 0
"#;

/// What the script asks rabbitmqctl for. The real ones are asked by `forgery` and the relay's fault suite.
#[test]
fn the_script_speaks_to_the_rabbitmqctl_of_4_0() {
    let folder = Folder::temporary().unwrap();
    let bin = folder.part("bin").unwrap();
    let (program, calls) = (bin.join("rabbitmqctl"), bin.join("calls"));
    fs::write(&program, RABBITMQCTL).unwrap();
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../deploy/permissions/rabbitmq.sh");
    let path = format!("{}:{}", bin.display(), std::env::var("PATH").unwrap());
    let mut said = String::new();
    for (arguments, password) in [
        (&["/", "outbox_relay_person"][..], "secret\n"),
        (&["/", "known", "relay"], "without an end of line"),
        (&["shop", "known.t", "subscriber", "address-book.v1"], "secret"),
        (&["shop", "replays", "replay", "a"], "secret"),
        (&["shop", "nobody", "relay"], ""),
        (&["shop", "nobody", "relay", "queue"], "secret"),
        (&["shop", "nobody", "subscriber"], "secret"),
        (&["shop", "nobody", "subscriber", ".*"], "secret"),
        (&["shop", "nobody", "administrator"], "secret"),
        (&["shop", "declares", "declaring-relay"], "secret"),
        (&["shop", "looks", "monitor"], "secret"),
    ] {
        let input = bin.join("password");
        fs::write(&input, password).unwrap();
        let _none = fs::remove_file(&calls);
        let output = Command::new(&script)
            .args(arguments)
            .env("PATH", &path)
            .env("CALLS", &calls)
            .stdin(fs::File::open(&input).unwrap())
            .output()
            .unwrap();
        let calls = fs::read_to_string(&calls).unwrap_or_default();
        let code = output.status.code().unwrap();
        assert_eq!(code != 0, calls.is_empty(), "it does nothing that it does not finish: {calls}");
        writeln!(said, "{}\n=> {code}\n{calls}", arguments.join(" ")).unwrap();
    }
    insta::assert_snapshot!(said, @r"
    / outbox_relay_person
    => 0
    -q list_users
    add_user outbox_relay_person < secret
    -q set_user_tags outbox_relay_person
    -q set_permissions -p / outbox_relay_person ^$ ^event_dispatcher$ ^$

    / known relay
    => 0
    -q list_users
    change_password known < without an end of line
    -q set_user_tags known
    -q set_permissions -p / known ^$ ^event_dispatcher$ ^$

    shop known.t subscriber address-book.v1
    => 0
    -q list_users
    add_user known.t < secret
    -q set_user_tags known.t
    -q set_permissions -p shop known.t ^(event_dispatcher([.]by_aggregate)?|address-book[.]v1([.].*)?)$ ^(event_dispatcher[.]by_aggregate|address-book[.]v1([.].*)?)$ ^(event_dispatcher([.]by_aggregate)?|address-book[.]v1([.].*)?)$

    shop replays replay a
    => 0
    -q list_users
    add_user replays < secret
    -q set_user_tags replays
    -q set_permissions -p shop replays ^outbox-replay[.].*$ ^(event_dispatcher|outbox-replay[.].*|a([.].*)?)$ ^outbox-replay[.].*$

    shop nobody relay
    => 2

    shop nobody relay queue
    => 2

    shop nobody subscriber
    => 2

    shop nobody subscriber .*
    => 2

    shop nobody administrator
    => 2

    shop declares declaring-relay
    => 0
    -q list_users
    add_user declares < secret
    -q set_user_tags declares
    -q set_permissions -p shop declares ^event_dispatcher([.]by_aggregate)?$ ^event_dispatcher([.]by_aggregate)?$ ^event_dispatcher$

    shop looks monitor
    => 0
    -q list_users
    add_user looks < secret
    -q set_user_tags looks management
    -q set_permissions -p shop looks ^$ ^$ ^$
    ");
}
