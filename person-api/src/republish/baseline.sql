-- Appends the baselines of persons whose rows are locked. A statement of its own: it sees what was committed when it
-- began, so it must begin under the locks. With the lock inside it, it would wait for a writer and then publish that
-- writer's version with the items of before (tried).
--
-- Parameters: 1 the persons' ids, 2 the largest body in bytes, 3 the largest number of items of each kind: a number
-- that fits no event for certain, so that one person cannot fill the server's memory. A body that is too large raises
-- no version; the statement returns the id of its person.
WITH state AS MATERIALIZED (
    SELECT person.id,
           (SELECT row_to_json(body)
            FROM (SELECT person.id, person.cpf, person.name, person.address, person.date_of_birth,
                         person.created_at, person.status,
                         incomes.items AS incomes, assets.items AS assets, debts.items AS debts) body) AS body
    FROM person.person,
         LATERAL (SELECT ARRAY(
             SELECT row_to_json(item)
             FROM (SELECT id, type, trim_scale(value) AS value, created_at
                   FROM person.income WHERE person_id = person.id ORDER BY id LIMIT $3) item) AS items) incomes,
         LATERAL (SELECT ARRAY(
             SELECT row_to_json(item)
             FROM (SELECT id, type, trim_scale(value) AS value, created_at
                   FROM person.asset WHERE person_id = person.id ORDER BY id LIMIT $3) item) AS items) assets,
         LATERAL (SELECT ARRAY(
             SELECT row_to_json(item)
             FROM (SELECT id, trim_scale(value) AS value, created_at
                   FROM person.debt WHERE person_id = person.id ORDER BY id LIMIT $3) item) AS items) debts
    WHERE person.id = ANY ($1)
), person AS (
    UPDATE person.person SET version = person.version + 1
    FROM state WHERE person.id = state.id AND octet_length(state.body::text) <= $2
    RETURNING person.id, person.version, state.body
), event AS (
    INSERT INTO outbox.event (aggregate_type, aggregate_id, version, type, payload, headers)
    SELECT 'person', id::text, version, 'person.baseline', body, '{"baseline": true}'
    FROM person ORDER BY id
    RETURNING position
)
-- The division is the same guard as of every write: no version without its event.
SELECT ARRAY(SELECT id FROM state WHERE octet_length(body::text) > $2 ORDER BY id),
       (SELECT count(*) FROM event),
       1 / ((SELECT count(*) FROM event) = (SELECT count(*) FROM person))::int
