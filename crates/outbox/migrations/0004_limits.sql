-- What an event may weigh, so that one writer's mistake is that writer's error and nobody's outage: a
-- body of 16 MiB (RabbitMQ's own default limit from 4.0 on) and headers of 64 KiB (a frame must hold
-- them). NOT VALID: what is stored already stays, and is not read now. As stored, jsonb is at most a
-- little larger than its text.
--
-- This waits for open writers and stops those behind it, so it gives up soon: run it again then.
SET LOCAL lock_timeout = '2s';
ALTER TABLE outbox.event
    ADD CONSTRAINT event_payload_size CHECK (pg_column_size(payload) <= 16777216 + 4) NOT VALID,
    ADD CONSTRAINT event_headers_size CHECK (pg_column_size(headers) <= 65536) NOT VALID;
