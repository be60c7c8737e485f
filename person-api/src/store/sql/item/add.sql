-- Adds an item to a person (kind: income).
--
-- Parameters: 1 cpf, 2 value, 3 caller, 4 route, 5 idempotency key or null, 6 digest of the request's body,
-- 7 location, 8 response body, 9 and 10 ids and versions of `If-Match` (null for any), 11 headers of the
-- event or null, 12 type.
--
-- The order is the promise: the person's row is locked, then its version raised, then the event's position taken. So
-- versions and positions rise together.
WITH target AS MATERIALIZED (
    -- `MATERIALIZED` keeps the lock a step of its own: a second writer waits here, and continues from the version that
    -- the first one committed.
    SELECT id, version, status FROM person.person WHERE cpf = $1 FOR UPDATE
), next AS MATERIALIZED (
    -- The database makes the id, under the lock, so that ids follow the versions to the millisecond.
    SELECT id AS person_id, version + 1 AS version, outbox.uuid7() AS id FROM target
    WHERE status = 'active'
      AND ($9::uuid[] IS NULL OR (target.id, target.version) IN (SELECT * FROM unnest($9::uuid[], $10::bigint[])))
), claim AS (
    -- A key that another request has taken meanwhile leaves no claim, and then nothing is written.
    INSERT INTO person.idempotency (caller, route, key, request, person_id, location, etag, body)
    SELECT $3, $4, $5, $6, person_id, replace($7, '{id}', id::text), '"' || person_id || '.' || version || '"',
           replace(replace($8, '{id}', id::text), '{version}', version::text)
    FROM next WHERE $5::text IS NOT NULL
    ON CONFLICT DO NOTHING
    RETURNING person_id
), person AS (
    UPDATE person.person SET version = next.version
    FROM next WHERE person.id = next.person_id AND ($5 IS NULL OR EXISTS (SELECT FROM claim))
    RETURNING person.*
), item AS (
    INSERT INTO person.income (
        type, -- not of a debt
        id, person_id, value)
    SELECT
        $12, -- not of a debt
        next.id, person.id, $2
    FROM person, next
    RETURNING *
), event AS (
    INSERT INTO outbox.event (aggregate_type, aggregate_id, version, type, payload, headers)
    SELECT 'person', person.id::text, person.version, 'income.new',
           (SELECT row_to_json(body)
            FROM (SELECT item.id, item.person_id,
                         item.type, -- not of a debt
                         trim_scale(item.value) AS value, item.created_at,
                         (SELECT row_to_json(body)
                          FROM (SELECT person.id, person.cpf, person.name, person.address, person.date_of_birth,
                                       person.created_at, person.status) body) AS person) body),
           $11::jsonb
    FROM person, item
    RETURNING position
)
-- The division is the guard that no write is stored without its event: when something in the database swallows the
-- event, such as a trigger, it fails, and with it the statement.
SELECT target.status = 'active' AS active,
       ($9::uuid[] IS NULL
        OR (target.id, target.version) IN (SELECT * FROM unnest($9::uuid[], $10::bigint[]))) AS matches,
       item.id, target.id AS person_id, person.version,
       1 / ((SELECT count(*) FROM event) = (SELECT count(*) FROM person))::int AS whole
FROM target LEFT JOIN person ON true LEFT JOIN item ON true
