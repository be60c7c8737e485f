-- Reads a page of a person's items (kind: income), in the order of their ids, by the index that has this order.
--
-- Parameters: 1 cpf, 2 the id after which the page begins, 3 the number of items. One more is read, to know whether
-- another page follows. `OFFSET 0` keeps PostgreSQL from reading the items again for each use.
SELECT person.id, person.version, cardinality(page.items) > $3 AS more, page.items[$3] ->> 'id' AS last,
       to_json(page.items[:$3])::text AS body
FROM person.person,
     LATERAL (SELECT ARRAY(
         SELECT row_to_json(item)
         FROM (SELECT id,
                      type, -- not of a debt
                      trim_scale(value) AS value, created_at
               FROM person.income WHERE person_id = person.id AND id > $2 ORDER BY id LIMIT $3 + 1) item) AS items
         OFFSET 0) page
WHERE person.cpf = $1
