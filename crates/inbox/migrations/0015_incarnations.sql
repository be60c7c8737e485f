-- Incarnations: after a restore, or a failover that lost commits, a source begins a new one, and every chain with it.
--
-- A source is spelled as its name alone in the first incarnation, and as NAME~NUMBER in every other. The number is a
-- bigint that comes from the clock, above the last one, so it never recurs.
SET LOCAL lock_timeout = '2s';

-- As before, for every bigint: 1 for `shop`, 1764426123456 for `shop~1764426123456`.
CREATE OR REPLACE FUNCTION inbox.incarnation(source text) RETURNS bigint
    LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$
    SELECT CASE WHEN source ~ '~[0-9]{1,19}$'
                THEN least(substring(source FROM '~([0-9]{1,19})$')::numeric, 9223372036854775807)::bigint
                ELSE 1 END
$$;

-- The reverse: how a source is spelled in an incarnation.
CREATE FUNCTION inbox.spell(name text, incarnation bigint) RETURNS text
    LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$
    SELECT CASE WHEN incarnation = 1 THEN name ELSE name || '~' || incarnation END
$$;

-- The newest incarnation that a consumer knows of each source, one row per name. The transaction that applies an event
-- reads its row FOR SHARE, and the one that takes a newer incarnation locks it FOR UPDATE. So no event of an earlier
-- incarnation is applied once a newer one is known. Events of any other incarnation are stored in inbox.rejected.
--   earlier   the incarnations before it that this consumer has known, the oldest first.
CREATE TABLE inbox.source (
    consumer    text        NOT NULL,
    name        text        NOT NULL,
    incarnation bigint      NOT NULL CHECK (incarnation >= 1),
    earlier     bigint[]    NOT NULL DEFAULT '{}',
    taken_at    timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (consumer, name)
);

-- What is known from the chains. A number that no outbox writes (`shop~0`, `shop~01`) is left out.
INSERT INTO inbox.source (consumer, name, incarnation, earlier)
SELECT k.consumer, k.name, max(k.incarnation),
       array_remove(array_agg(k.incarnation ORDER BY k.incarnation), max(k.incarnation))
FROM (SELECT s.consumer, s.source, split_part(s.source, '~', 1) AS name, inbox.incarnation(s.source) AS incarnation
      FROM inbox.sources() s) k
WHERE k.incarnation >= 1 AND k.source = inbox.spell(k.name, k.incarnation)
GROUP BY k.consumer, k.name;

-- The earlier incarnations of each source, as they are spelled.
CREATE VIEW inbox.earlier_source AS
SELECT s.consumer, s.name, e.incarnation, inbox.spell(s.name, e.incarnation) AS source
FROM inbox.source s CROSS JOIN LATERAL unnest(s.earlier) AS e (incarnation);

-- What is remembered of a chain besides its version.
--   ended    the consumer has no state of the aggregate: its deletion was applied, or its chain began anew in a later
--            incarnation of its source. Not known of an aggregate that was deleted before this column existed.
--   recent   the ids of the last events applied: 4 bytes of each, at most 16 of them, the last one at the end, without
--            holes in the versions. An event with another id than the one applied at its version is a fork.
-- Neither is in a key, and `ended` changes once in a chain's life, so raising a version stays an update in place (HOT).
ALTER TABLE inbox.aggregate ADD COLUMN ended boolean NOT NULL DEFAULT false;
ALTER TABLE inbox.aggregate ADD COLUMN recent bytea;
ALTER TABLE inbox.aggregate ALTER COLUMN recent SET STATISTICS 0;

-- Where a chain has begun in a later incarnation already, the earlier one has ended. What is still held of it can
-- never be applied.
UPDATE inbox.aggregate a SET ended = true
FROM inbox.earlier_source e
WHERE a.consumer = e.consumer AND a.source = e.source
  AND EXISTS (SELECT FROM inbox.source s
              CROSS JOIN LATERAL unnest(s.earlier || s.incarnation) AS l (incarnation)
              JOIN inbox.aggregate later
                ON (later.consumer, later.source, later.aggregate_type, later.aggregate_id)
                 = (a.consumer, inbox.spell(s.name, l.incarnation), a.aggregate_type, a.aggregate_id)
              WHERE s.consumer = e.consumer AND s.name = e.name AND l.incarnation > e.incarnation AND later.version > 0);
DELETE FROM inbox.held h USING inbox.aggregate a
WHERE a.ended AND (a.consumer, a.source, a.aggregate_type, a.aggregate_id)
                = (h.consumer, h.source, h.aggregate_type, h.aggregate_id);

-- The chains of a source that have not ended, by the source: few bytes each, since the keys are equal. Made last, so
-- that it is built once.
CREATE INDEX aggregate_not_ended ON inbox.aggregate (consumer, source) WHERE NOT ended;

-- Aggregates that the newest incarnation of their source has not begun yet, although the consumer has a chain of an
-- earlier one. Version 0: nothing of it was applied, but events of it are held. By the index aggregate_not_ended, as
-- many rows as are read, so limit what you read.
CREATE VIEW inbox.left_behind AS
SELECT a.consumer, e.name AS source_name, a.aggregate_type, a.aggregate_id, e.incarnation, a.version
FROM inbox.earlier_source e
JOIN inbox.aggregate a ON a.consumer = e.consumer AND a.source = e.source AND NOT a.ended;
COMMENT ON VIEW inbox.left_behind IS
    'A row: an aggregate whose chain is of an earlier incarnation than the newest one of its source. It waits for a baseline,
or for its deletion. version 0: nothing of it was applied, but events of it are held.';

-- At most so many of a consumer's, always by that index. The planner would rather read the whole table: it expects rows
-- of an earlier incarnation everywhere, and does not know that nearly all of them have ended.
CREATE FUNCTION inbox.some_left_behind(of_consumer text, most integer) RETURNS SETOF inbox.left_behind
    LANGUAGE sql STABLE
    SET enable_seqscan = off AS $$
    SELECT e.consumer, e.name, a.aggregate_type, a.aggregate_id, e.incarnation, a.version
    FROM inbox.earlier_source e
    CROSS JOIN LATERAL (SELECT * FROM inbox.aggregate
                        WHERE consumer = e.consumer AND source = e.source AND NOT ended LIMIT most) a
    WHERE e.consumer = of_consumer
    LIMIT most
$$;

-- Messages of an incarnation that the consumer does not take:
--   superseded  the source has gone on to a later incarnation: an old primary that woke up, or what queues still had.
--   unrelated   its incarnation is newer, but does not follow the newest one known here.
ALTER TABLE inbox.rejected DROP CONSTRAINT rejected_reason_check;
ALTER TABLE inbox.rejected ADD CONSTRAINT rejected_reason_check
    CHECK (reason IN ('malformed', 'fork', 'foreign', 'wrong-user', 'superseded', 'unrelated'));

-- What a consumer needs and no more: the rights of before, and to record the newest incarnation of a source.
CREATE OR REPLACE FUNCTION inbox.grant_consumer(role regrole) RETURNS void
    LANGUAGE plpgsql AS $$
BEGIN
    EXECUTE format('GRANT USAGE ON SCHEMA inbox TO %s', role);
    EXECUTE format('GRANT SELECT ON inbox.migration, inbox.earlier_source, inbox.left_behind TO %s', role);
    EXECUTE format('GRANT SELECT, INSERT, UPDATE, DELETE ON inbox.aggregate, inbox.held, inbox.rejected, inbox.erasure'
                   ' TO %s', role);
    EXECUTE format('GRANT SELECT, INSERT, UPDATE ON inbox.source TO %s', role);
    EXECUTE format('GRANT SELECT, INSERT ON inbox.skipped TO %s', role);
END
$$;

-- What a reader of a read model needs and no more: how far it has come. No bodies.
CREATE OR REPLACE FUNCTION inbox.grant_reader(role regrole) RETURNS void
    LANGUAGE plpgsql AS $$
BEGIN
    EXECUTE format('GRANT USAGE ON SCHEMA inbox TO %s', role);
    EXECUTE format('GRANT SELECT ON inbox.migration, inbox.aggregate, inbox.source, inbox.earlier_source,'
                   ' inbox.left_behind TO %s', role);
END
$$;

-- A role that consumes or reads already keeps doing so.
SELECT inbox.grant_consumer(r.grantee::regrole)
FROM pg_class c, aclexplode(c.relacl) r
WHERE c.oid = 'inbox.held'::regclass AND r.privilege_type = 'INSERT' AND r.grantee <> c.relowner;
SELECT inbox.grant_reader(r.grantee::regrole)
FROM pg_class c, aclexplode(c.relacl) r
WHERE c.oid = 'inbox.aggregate'::regclass AND r.privilege_type = 'SELECT' AND r.grantee <> c.relowner AND r.grantee <> 0
  AND NOT EXISTS (SELECT FROM aclexplode(c.relacl) w WHERE w.grantee = r.grantee AND w.privilege_type = 'INSERT');
