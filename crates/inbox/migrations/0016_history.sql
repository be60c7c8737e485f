-- What is held by the hundred thousand is found by index, however much it is.
SET LOCAL lock_timeout = '2s';

-- As before, by reason, the oldest first, and with the source in it: counting what is held of the newest incarnations
-- reads the index alone.
CREATE INDEX held_by_reason ON inbox.held (consumer, reason, first_at) INCLUDE (source);
DROP INDEX inbox.held_reason;
ALTER INDEX inbox.held_by_reason RENAME TO held_reason;

-- The refused events, those first that have waited longest for another try: while consuming stands still because of them,
-- the consumer tries one of them again and again. They alone have an error.
CREATE INDEX held_retry ON inbox.held (consumer, last_at) WHERE error IS NOT NULL;
