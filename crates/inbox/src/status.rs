/// One thing that a consumer needs: `Ok`, or why the consumer waits for it.
pub type Part = Result<(), String>;

/// What a consumer waits for, and what an operator should look at. A program maps it to its readiness. No text contains
/// secrets or personal data.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Status {
    /// The database responds and takes writes.
    pub database: Part,
    /// The broker is connected, and its exchanges and queues have the right properties.
    pub broker: Part,
    /// The consumer subscribes to the queue and to its dead letters.
    pub consuming: Part,
    /// The messages of the followed sources came from their broker users.
    pub sources: Part,
    /// Received messages are applied, or none waits.
    pub applying: Part,
    /// Versions that have been missing for too long, if any. Consuming goes on.
    pub holes: Option<String>,
    /// Events that contradict the applied ones (suspected forks), if any. Consuming goes on.
    pub forks: Option<String>,
    /// What is of another incarnation of a source than the newest one, if anything: messages that were not applied, and
    /// aggregates that wait for a baseline. Consuming goes on.
    pub incarnations: Option<String>,
    /// The queue was new although events had been applied, so what lay in it is lost. This stays until the process ends.
    /// Consuming goes on.
    pub queue: Option<String>,
    /// The limits of stored messages and held events that are reached, if any. Consuming goes on.
    pub limits: Option<String>,
}

impl Status {
    /// Each part that the consumer waits for, with the reason. Empty when it works.
    ///
    /// ```
    /// # fn example(status: inbox::Status) {
    /// let waiting = status.waiting();
    /// let (code, body) = if waiting.is_empty() { (200, "ready".to_owned()) } else { (503, waiting.join("\n")) };
    /// # }
    /// ```
    pub fn waiting(&self) -> Vec<String> {
        let parts = [
            ("database", &self.database),
            ("broker", &self.broker),
            ("consuming", &self.consuming),
            ("sources", &self.sources),
            ("applying", &self.applying),
        ];
        let reason = |(name, part): (&str, &Part)| part.as_ref().err().map(|why| format!("{name}: {why}"));
        parts.into_iter().filter_map(reason).collect()
    }

    pub(crate) fn starting() -> Self {
        let starting = || Err("starting".to_owned());
        Self {
            database: starting(),
            broker: starting(),
            consuming: starting(),
            sources: Ok(()),
            applying: Ok(()),
            holes: None,
            forks: None,
            incarnations: None,
            queue: None,
            limits: None,
        }
    }
}
