-- Reads an item of a person (kind: income). The body is null when the person has no item with this id.
--
-- Parameters: 1 cpf, 2 id.
SELECT person.id, person.version,
       (SELECT row_to_json(body)::text
        FROM (SELECT id,
                     type, -- not of a debt
                     trim_scale(value) AS value, created_at
              FROM person.income WHERE id = $2 AND person_id = person.id) body) AS body
FROM person.person WHERE cpf = $1
