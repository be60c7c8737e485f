-- Waiting costs rows, not memory. An event that is not taken waits, and later events of its aggregate wait behind it,
-- while everything else goes on. Beyond a small number such events leave the relay's memory for outbox.parked, with
-- the state `waiting`. Their positions are settled, so the low-water mark, reading and retention go on behind them;
-- they return in the order of their positions.
--
--   state            parked: set aside, and later events of the aggregate go on.
--                    waiting: later events of the aggregate wait behind it. Its row has no copy of the body: the event
--                    itself is kept, because a partition with such rows is never retired.
--   reason           why it was not taken. `behind`: it was not tried yet.
--   attempts         how often it was not taken.
--   next_attempt_at  of waiting rows, the first of each aggregate alone has one.
SET LOCAL lock_timeout = '2s';
ALTER TABLE outbox.parked
    ADD COLUMN state text NOT NULL DEFAULT 'parked' CHECK (state IN ('parked', 'waiting')),
    ALTER COLUMN payload DROP NOT NULL,
    DROP CONSTRAINT parked_reason_check,
    ADD CONSTRAINT parked_reason_check CHECK (reason IN ('unroutable', 'refused', 'nacked', 'silent', 'behind')),
    ADD CONSTRAINT parked_payload_check CHECK (state = 'waiting' OR payload IS NOT NULL);

-- What is set aside, without what waits, of which there may be millions.
CREATE INDEX parked_aside ON outbox.parked (relay, position) WHERE state = 'parked';
-- Whether an aggregate waits, and with which event it begins.
CREATE INDEX parked_waiting ON outbox.parked (relay, aggregate_type, aggregate_id, position) WHERE state = 'waiting';
-- What of a kind to try next: what was not tried yet, and what was.
CREATE INDEX parked_waiting_due ON outbox.parked (relay, type, aggregate_type, least(attempts, 1), next_attempt_at)
    WHERE state = 'waiting' AND next_attempt_at IS NOT NULL;
