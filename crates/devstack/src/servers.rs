//! PostgreSQL and RabbitMQ together, in one folder.

use std::time::Instant;

use tokio_util::sync::CancellationToken;

use crate::{folder::Folder, ports, postgres::Postgres, rabbitmq::RabbitMq, say};

/// How a stack is set up.
#[derive(Clone, Copy, Debug)]
pub struct Setup {
    /// The usual ports where they are free, instead of any.
    pub usual_ports: bool,
    /// Commits survive a loss of power, which tests need not pay for.
    pub durable: bool,
    /// Settings of PostgreSQL beyond what a stack needs: `name=value`.
    pub settings: &'static [&'static str],
    /// Is told of each step.
    pub report: fn(&str),
}

impl Setup {
    /// For people: data is kept, addresses can be remembered.
    pub const KEPT: Self = Self { usual_ports: true, durable: true, settings: &[], report: say };
    /// For a passing use.
    pub const PASSING: Self = Self { usual_ports: false, durable: false, settings: &[], report: say };
    /// For tests, whose output is about failures.
    pub const QUIET: Self = Self { report: |_| (), ..Self::PASSING };

    /// The port `usual`, or any free one.
    pub fn port(self, usual: u16) -> u16 {
        if self.usual_ports { ports::usual(usual) } else { ports::free() }
    }
}

/// The two servers.
#[derive(Debug)]
pub struct Servers {
    /// The private PostgreSQL.
    pub postgres: Postgres,
    /// The private RabbitMQ.
    pub rabbitmq: RabbitMq,
    report: fn(&str),
}

impl Servers {
    /// Starts both at once and waits until both answer.
    pub async fn start(folder: &Folder, setup: Setup) -> anyhow::Result<Self> {
        let begin = Instant::now();
        let report = setup.report;
        report(&format!("starting PostgreSQL and RabbitMQ in {}", folder.path().display()));
        let (amqp, management) = (setup.port(5680), setup.port(15680));
        let postgres = async {
            let postgres = Postgres::new(folder, setup.port(5440), setup.durable).await?;
            let mut postgres = postgres.with(setup.settings);
            postgres.start().await?;
            let seconds = begin.elapsed().as_secs_f32();
            report(&format!("PostgreSQL {} answers after {seconds:.1} s", postgres.version()));
            anyhow::Ok(postgres)
        };
        let rabbitmq = async {
            let mut rabbitmq = RabbitMq::new(folder, amqp, management)?;
            rabbitmq.start().await?;
            let seconds = begin.elapsed().as_secs_f32();
            report(&format!("RabbitMQ {} answers after {seconds:.1} s", rabbitmq.version()));
            anyhow::Ok(rabbitmq)
        };
        let (postgres, rabbitmq) = tokio::try_join!(postgres, rabbitmq)?;
        Ok(Self { postgres, rabbitmq, report })
    }

    /// Stops both, at once instead of in good order when `hurry` is cancelled.
    pub async fn stop(&mut self, hurry: &CancellationToken) {
        for (name, in_good_order) in
            [("RabbitMQ", self.rabbitmq.stop(hurry).await), ("PostgreSQL", self.postgres.stop(hurry).await)]
        {
            (self.report)(&format!("{name} has stopped{}", if in_good_order { "" } else { ", in a hurry" }));
        }
    }
}
